"""``open_clip/NAME``: the image towers of open_clip's CLIP models, with a linear head; text towers make the head.

``open_clip/ViT-B-32.laion2b_s34b_b79k`` has the tag of its weights; without a tag ``default_tag`` chooses.  A network
consists of the image tower, the L2 normalisation of its embedding and ``head``; the text tower is used only to compute
a zero-shot head, and is neither kept nor saved.  open_clip is an optional package, imported at first use.
"""

import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import ArtifactError, UsageError, did_you_mean, first_line
from potstill.input_spec import Triple
from potstill.models import state_dict
from potstill.models.pretrained import download_from_hub, download_from_url

# Data sets of published weights, best first: on the architectures that have several of them, their zero-shot accuracy
# on ImageNet falls in this order (results table of open_clip's repository).
_DATA_SETS = ("datacomp_xl", "datacomp1b", "laion2b", "openai")
_NORMALISATION: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_WITHOUT_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # a tower to throw away
_TEXTS = 64  # that are encoded at a time


class ImageTower(nn.Module):
    """A classifier: images [B, 3, S, S] -> image tower -> embedding of norm 1, [B, D] -> ``head`` -> logits [B, K]."""

    def __init__(self, visual: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, 3, S, S]."""
        embedding = self.visual(images)
        if isinstance(embedding, tuple):  # CoCa's towers return the tokens too
            embedding = embedding[0]
        logits: Tensor = self.head(F.normalize(embedding, dim=-1))
        return logits


def names() -> list[str]:
    """Return the names of open_clip, none if it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return []
    import open_clip

    return cast("list[str]", open_clip.list_models())


def is_model(name: str) -> bool:
    """Return whether open_clip has a network of this name, with or without a tag."""
    if importlib.util.find_spec("open_clip") is None:
        raise UsageError(f"open_clip/{name} needs open_clip, not installed here\nInstall: pip install 'potstill[clip]'")
    bare, _, tag = name.partition(".")
    if bare not in names():
        return False
    if tag and tag not in (tags := _tags(bare)):
        published = f"it has {', '.join(tags)}" if tags else "none are published"
        raise UsageError(f"open_clip/{bare} has no weights {tag!r}{did_you_mean(tag, tags)}: {published}")
    return True


def build(name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
    import open_clip

    if in_chans != 3:
        raise UsageError(f"the image towers of open_clip take images with 3 channels, got in_chans={in_chans}")
    config = _config(name)
    vision = {**config["vision_cfg"], "image_size": size, "timm_model_pretrained": False}
    model = open_clip.CLIP(
        config["embed_dim"],
        open_clip.CLIPVisionCfg(**vision),
        open_clip.CLIPTextCfg(**_WITHOUT_TEXT),
        quick_gelu=config.get("quick_gelu", False),
    )
    _set_size(model.visual, size, own_size(name))
    return ImageTower(model.visual, config["embed_dim"], num_classes)


def own_size(name: str) -> int:
    size = _config(name)["vision_cfg"].get("image_size", 224)
    return int(size if isinstance(size, int) else max(size))


def normalisation(name: str) -> tuple[Triple, Triple]:
    bare, _, tag = name.partition(".")
    published = _tags(bare)
    settings = published.get(tag or default_tag(name) or "", {})
    mean, std = settings.get("mean", _NORMALISATION[0]), settings.get("std", _NORMALISATION[1])
    return tuple(mean), tuple(std)


def pretrained(name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
    return load(name, published_weights(name), num_classes, size)[0], 0  # texts, and no classes


def default_tag(name: str) -> str | None:
    """Return the tag of the weights of a name without one; None if none are published.

    Only weights with the network's own activation count (QuickGELU or GELU).  Of these, the data set decides, in the
    order DataComp, LAION-2B, OpenAI's; then open_clip's list, whose last entry of a data set is its longest training.
    """
    bare = name.partition(".")[0]
    fitting = [tag for tag, settings in _tags(bare).items() if _fits_activation(bare, settings)]
    for data in _DATA_SETS:
        if found := [tag for tag in fitting if tag.startswith(data)]:
            return found[-1]
    return fitting[-1] if fitting else None


def published_weights(name: str) -> Path:
    """Return the file with the weights of a name's tag, downloaded if it is not in the cache."""
    bare, _, tag = name.partition(".")
    tag = tag or default_tag(bare) or ""
    settings = _tags(bare).get(tag)
    if settings is None:
        raise UsageError(
            f"no weights are published for open_clip/{name}: give a file with --teacher open_clip/NAME@FILE"
        )
    if not _fits_activation(bare, settings):
        other = bare.removesuffix("-quickgelu") if bare.endswith("-quickgelu") else f"{bare}-quickgelu"
        raise UsageError(f"the weights {tag} were trained with another activation: use open_clip/{other}.{tag}")
    what = f"the weights {tag} of 'open_clip/{bare}'"
    if not settings.get("hf_hub"):
        return download_from_url(settings["url"], what)
    repository, _, file = settings["hf_hub"].rpartition("/")
    files = [f"{Path(file).stem}.safetensors", file] if file else ["open_clip_model.safetensors"]
    return download_from_hub(repository, [*files, *([] if file else ["open_clip_pytorch_model.bin"])], what)


def load(name: str, path: Path, num_classes: int, size: int) -> tuple[nn.Module, bool]:
    """Return a network with the image tower of a CLIP checkpoint, or an ``ImageTower``; and whether its head is new."""
    module = cast(ImageTower, build(name, num_classes, size, 3))
    state = state_dict.read_state_dict(path)
    if not _has_text_tower(state):
        return module, state_dict.load_state_dict(module, state, num_classes, origin=str(path))
    module.visual = _load_clip(name, state, size, str(path)).visual
    return module, True


def load_zero_shot(
    name: str, path: Path, texts: Sequence[Sequence[str]], size: int
) -> tuple[nn.Module, dict[str, float | None]]:
    r"""Return a network whose head is made of texts.

    .. math::
        z_k = s \, \frac{e}{\lVert e \rVert} \cdot \frac{m_k}{\lVert m_k \rVert} + b, \qquad
        m_k = \frac{1}{\lvert T_k \rvert} \sum_{t \in T_k} \frac{t}{\lVert t \rVert}

    with the embedding e of an image, the embeddings T_k of a class's texts, and the model's own logit scale s and bias
    b, which are returned too; the same as ``open_clip.build_zero_shot_classifier``.
    """
    module = cast(ImageTower, load(name, path, len(texts), size)[0])
    written = path.stat().st_mtime_ns
    weight, scale, bias = _class_embeddings(name, str(path), written, tuple(tuple(each) for each in texts))
    with torch.no_grad():
        module.head.weight.copy_(scale * weight)
        module.head.bias.fill_(bias or 0.0)
    return module, {"logit_scale": scale, "logit_bias": bias}


@functools.lru_cache(maxsize=2)  # the checks before a run build the same head
def _class_embeddings(
    name: str, path: str, written: int, texts: tuple[tuple[str, ...], ...]
) -> tuple[Tensor, float, float | None]:
    """Return mean embeddings [K, D] of each class's texts, scale and bias; ``written``: when the file changed."""
    import open_clip

    state = state_dict.read_state_dict(Path(path))
    if not _has_text_tower(state):
        raise ArtifactError(
            f"{path} has no text tower, and head: zero_shot is made of the embeddings of texts: give a checkpoint of "
            "open_clip with both towers, or use head: probe"
        )
    model = _load_clip(name, state, own_size(name), path).eval()
    with _text_tower(name), _no_root_logging():
        tokenizer = open_clip.get_tokenizer(name.partition(".")[0])
    flat = [text for each in texts for text in each]
    encoded = []
    with torch.no_grad():
        for at in range(0, len(flat), _TEXTS):
            encoded.append(model.encode_text(tokenizer(flat[at : at + _TEXTS]), normalize=True).float())
    parts = torch.split(torch.cat(encoded), [len(each) for each in texts])
    bias = getattr(model, "logit_bias", None)
    return (
        F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1),
        float(model.logit_scale.detach().exp()),
        None if bias is None else float(bias.detach()),
    )


def _load_clip(name: str, state: dict[str, Tensor], size: int, origin: str) -> Any:
    import open_clip
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    bare, own = name.partition(".")[0], own_size(name)
    is_timm = "timm_model_name" in _config(name)["vision_cfg"]
    with _text_tower(name), _no_root_logging():
        model = open_clip.create_model(
            bare, load_weights=False, pretrained_text=False, force_image_size=None if is_timm else size
        )
    try:
        state = convert_state_dict(model, dict(state))
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for key in ("logit_scale", "logit_bias"):
            if key in state and getattr(model, key, None) is not None:
                state[key] = state[key].reshape(getattr(model, key).shape)
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except (KeyError, AttributeError, AssertionError, RuntimeError, IndexError) as error:
        raise ArtifactError(f"{origin} does not contain the weights of open_clip/{bare}: {error}") from error
    try:
        state_dict.load_state_dict(model, state, 0, origin=origin)
    except ArtifactError as error:
        hint = "" if is_timm or size == own else f"\nAt {own} px, for which open_clip/{bare} was designed, it may fit"
        raise ArtifactError(f"{error}{hint}") from error
    _set_size(model.visual, size, own)
    return model


def _has_text_tower(state: dict[str, Tensor]) -> bool:
    return any(key.startswith(("text", "token_embedding", "transformer.")) for key in state)


def _config(name: str) -> dict[str, Any]:
    import open_clip

    return cast("dict[str, Any]", open_clip.get_model_config(name.partition(".")[0]))


def _tags(bare: str) -> dict[str, dict[str, Any]]:
    import open_clip

    return {tag: open_clip.get_pretrained_cfg(bare, tag) for tag in open_clip.list_pretrained_tags_by_model(bare)}


def _fits_activation(bare: str, settings: dict[str, Any]) -> bool:
    return bool(settings.get("quick_gelu", False)) == bool(_config(bare).get("quick_gelu", False))


def _set_size(visual: Any, size: int, own: int) -> None:
    """Set the image size of a tower of timm; other towers are built for their size."""
    if size != own and hasattr(visual, "trunk") and hasattr(visual, "set_input_size"):
        with _no_root_logging():
            visual.set_input_size(size)


@contextmanager
def _text_tower(name: str) -> Iterator[None]:
    """Turn what open_clip raises where a text tower or a tokenizer is not at hand into one message."""
    try:
        yield
    except Exception as error:  # of transformers, the hub's client, or an import
        raise UsageError(
            f"the text tower of open_clip/{name} cannot be built ({first_line(error)}).\n"
            "It may need `pip install transformers`, or its tokenizer from the Hugging Face hub; networks such as "
            "open_clip/ViT-B-32 need neither"
        ) from error


@contextmanager
def _no_root_logging() -> Iterator[None]:
    """Keep open_clip's messages from configuring the root logger, as ``logging.info`` does if it has no handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)

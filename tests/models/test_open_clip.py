"""Networks of open_clip: the same logits as its own zero-shot classifier; image towers without their text tower."""

import importlib.util
import json

import pytest
import torch

from potstill.errors import ArtifactError, UsageError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model, load_weights, load_zero_shot
from potstill.models.families import open_clip_models
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.models.registry import check_model, input_spec, list_models, own_size

TEMPLATES = ("a photo of a {}.", "a bad picture of {}", "{}")
CLASSES = ("tabby cat", "dog", "fire truck")
PROMPTS = {name: [template.format(name) for template in TEMPLATES] for name in CLASSES}


def reference(checkpoint, images, *, size=32, **settings):
    """open_clip's own logits."""
    import open_clip

    model = open_clip.create_model("tiny", force_image_size=size, **settings).eval()
    open_clip.load_checkpoint(model, str(checkpoint))
    weights = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer("tiny"), CLASSES, TEMPLATES)
    with torch.no_grad():
        logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ weights
        return logits if model.logit_bias is None else logits + model.logit_bias


@pytest.mark.parametrize("size", [32, 48])
def test_zero_shot_logits_are_those_of_open_clip(clip, size):
    module, scale = load_zero_shot("open_clip/tiny", str(clip), PROMPTS, size=size)
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = reference(clip, images, size=size)
    with torch.no_grad():
        found = module.eval()(images)
    assert found.shape == (5, 3)
    assert (found - expected).abs().max() < 1e-5
    assert expected.std() > 0.1
    assert scale == {"logit_scale": pytest.approx(1 / 0.07, rel=1e-5), "logit_bias": None}


def test_a_bias_of_the_logits_is_kept(clip, tmp_path):
    state = torch.load(clip)["state_dict"]
    torch.save({**state, "logit_bias": torch.tensor(-10.0), "logit_scale": torch.tensor([2.0])}, tmp_path / "siglip.pt")
    import open_clip

    config = {**open_clip.get_model_config("tiny"), "init_logit_bias": -5.0}
    (tmp_path / "tiny-bias.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-bias.json")
    module, scale = load_zero_shot("open_clip/tiny-bias", str(tmp_path / "siglip.pt"), PROMPTS, size=32)
    images = torch.randn(4, 3, 32, 32)
    expected = reference(tmp_path / "siglip.pt", images, init_logit_bias=-5.0)
    assert (module.eval()(images) - expected).abs().max() < 1e-5
    assert scale == {"logit_scale": pytest.approx(torch.tensor(2.0).exp().item()), "logit_bias": -10.0}
    assert expected.mean() < -8


def test_more_texts_than_a_batch_and_unequal_numbers_of_them(clip):
    prompts = {"cat": [f"cat number {i}" for i in range(70)], "dog": ["a dog"]}
    module, scale = load_zero_shot("open_clip/tiny", str(clip), prompts, size=32)
    import open_clip

    model = open_clip.create_model("tiny").eval()
    open_clip.load_checkpoint(model, str(clip))
    templates = [lambda name, text=text: text for text in prompts["cat"]]
    expected = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer("tiny"), ["cat"], templates)
    assert torch.allclose(module.head.weight[0] / scale["logit_scale"], expected[:, 0], atol=1e-6)


def test_a_new_file_at_the_same_path_is_read_again(clip, tmp_path):
    path = tmp_path / "changing.pt"
    heads = []
    for factor in (1.0, -1.0):
        state = torch.load(clip)["state_dict"]
        state["text_projection"] = factor * state["text_projection"]
        torch.save(state, path)
        heads.append(load_zero_shot("open_clip/tiny", str(path), PROMPTS, size=32)[0].head.weight)
    assert torch.allclose(heads[0], -heads[1])


def test_the_saved_model_has_no_text_tower_and_loads_without_it(clip, tmp_path):
    module, _ = load_zero_shot("open_clip/tiny", str(clip), PROMPTS, size=32)
    save_model(Classifier(module, "open_clip/tiny", CLASSES, InputSpec(32)), tmp_path)
    loaded = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.module(images), module.eval()(images))
    assert {key.partition(".")[0] for key in loaded.module.state_dict()} == {"visual", "head"}


def test_the_image_tower_gets_a_new_head_for_a_probe(clip):
    loaded = load_weights("open_clip/tiny", str(clip), 7, size=32)
    assert loaded.new_head
    expected = torch.load(clip)["state_dict"]["visual.conv1.weight"]
    assert torch.equal(loaded.module.visual.conv1.weight, expected)
    assert loaded.module(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_bare_weights_of_the_classifier_are_read_too(clip, tmp_path):
    module = create_model("open_clip/tiny", 4, size=32)
    torch.save(module.state_dict(), tmp_path / "own.pth")
    loaded = load_weights("open_clip/tiny", str(tmp_path / "own.pth"), 4, size=32)
    assert not loaded.new_head
    assert torch.equal(loaded.module.head.weight, module.head.weight)
    with pytest.raises(ArtifactError, match=r"has no text tower.* or use head: probe"):
        load_zero_shot("open_clip/tiny", str(tmp_path / "own.pth"), PROMPTS, size=32)


def test_checkpoints_of_other_networks_are_refused(clip, tmp_path):
    state = torch.load(clip)["state_dict"]
    torch.save({key: value for key, value in state.items() if "resblocks.1" not in key}, tmp_path / "part.pt")
    with pytest.raises(ArtifactError, match="does not contain the weights of this network\nmissing: "):
        load_weights("open_clip/tiny", str(tmp_path / "part.pt"), 3, size=32)
    torch.save(state, tmp_path / "tiny.pt")
    with pytest.raises(ArtifactError, match=r"does not contain the weights of open_clip/RN50: text pos_embed"):
        load_weights("open_clip/RN50", str(tmp_path / "tiny.pt"), 3, size=224)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-B-32", "datacomp_xl_s13b_b90k"),
        ("ViT-H-14", "laion2b_s32b_b79k"),
        ("ViT-B-32-quickgelu", "openai"),
        ("MobileCLIP-B", "datacompdr_lt"),
        ("ViT-B-16-SigLIP", "webli"),
        ("tiny", None),
    ],
)
def test_the_default_tag_follows_a_rule(clip, name, tag):
    assert open_clip_models.default_tag(name) == tag


def test_size_and_normalisation_are_those_of_the_weights(clip):
    assert input_spec("open_clip/ViT-B-32", 224).mean == (0.48145466, 0.4578275, 0.40821073)
    assert input_spec("open_clip/ViT-B-16-SigLIP-384", 224).std == (0.5, 0.5, 0.5)
    assert own_size("open_clip/ViT-B-16-SigLIP-384") == 384
    assert own_size("open_clip/tiny") == 32


def test_missing_weights_are_named(clip, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as error:
        load_zero_shot("open_clip/ViT-B-32", "pretrained", PROMPTS, size=224)
    for part in ("the weights datacomp_xl_s13b_b90k of 'open_clip/ViT-B-32' are not in the cache", "HF_HUB_OFFLINE",
                 "hf download laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "or give a file"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(UsageError, match="no weights are published for open_clip/tiny"):
        load_weights("open_clip/tiny", "pretrained", 3, size=32)
    with pytest.raises(UsageError, match=r"another activation: use open_clip/ViT-B-32-quickgelu\.openai"):
        load_weights("open_clip/ViT-B-32.openai", "pretrained", 3, size=224)


def test_weights_from_the_cache_are_found(clip, monkeypatch):
    asked = []

    def found(repository, files, what):
        asked.append((repository, tuple(files)))
        return clip

    monkeypatch.setattr(open_clip_models, "download_from_hub", found)
    open_clip_models.published_weights("ViT-B-32")
    open_clip_models.published_weights("ViT-L-14.commonpool_xl_s13b_b90k")
    assert [each[1] for each in asked] == 2 * [("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
    monkeypatch.setattr(open_clip_models, "published_weights", lambda name: clip)
    assert load_weights("open_clip/tiny", "pretrained", 3, size=32).new_head


def test_names_and_tags(clip):
    assert "open_clip/tiny" in list_models("open_clip/")
    check_model("open_clip/ViT-B-32.laion2b_s34b_b79k")
    with pytest.raises(UsageError, match=r"no model 'open_clip/ViT-B-33'; did you mean 'open_clip/ViT-B-32'"):
        check_model("open_clip/ViT-B-33")
    with pytest.raises(UsageError, match=r"has no weights 'laion2b_s34b_b79'; did you mean 'laion2b_s34b_b79k'"):
        check_model("open_clip/ViT-B-32.laion2b_s34b_b79")
    with pytest.raises(UsageError, match="3 channels"):
        create_model("open_clip/tiny", 3, size=32, in_chans=1)


def test_without_open_clip_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs open_clip, not installed here\nInstall: pip install 'potstill\[clip\]'"
    ):
        check_model("open_clip/ViT-B-32")
    assert open_clip_models.names() == []


def test_other_networks_have_no_text_tower():
    with pytest.raises(UsageError, match="cifar/vgg8 has no text tower"):
        load_zero_shot("cifar/vgg8", "pretrained", PROMPTS, size=32)

"""Checkpoints of Hugging Face transformers compute in timm's networks what they compute there."""

import json

import pytest
import safetensors.torch
import timm
import torch

from potstill.models.factory import load_weights
from potstill.models.foreign_checkpoints import identify_network
from potstill.models.state_dict import read_checkpoint


def test_networks_of_transformers_compute_the_same(tmp_path):
    transformers = pytest.importorskip("transformers", reason="package transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12}
    vit = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=5, layer_norm_eps=1e-6, **sizes)
    resnet = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=5
    )
    for config, build, name in (
        (vit, transformers.ViTForImageClassification, "timm/vit_tiny_patch16_32"),
        (resnet, transformers.ResNetForImageClassification, "timm/resnet18"),
    ):
        network, folder = build(config).eval(), tmp_path / name.replace("/", "-")
        network.save_pretrained(folder)
        if "vit" in name:  # timm has no network of this size by name
            name = "timm/vit_tiny_patch16_224"
        else:
            assert identify_network(folder) == name
        loaded = load_weights(name, str(folder), 5, size=32)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = network(images).logits
            assert torch.allclose(loaded.module.eval()(images), expected, atol=1e-4)
        assert any("transformers" in note for note in loaded.notes)


def theirs_of_resnet(key: str) -> str:
    """The name in transformers of a tensor of torchvision's ResNet-18."""
    parts = key.split(".")
    kind = {"conv": "convolution", "bn": "normalization"}
    if parts[0].startswith("layer"):
        lead = f"resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
        if parts[2] == "downsample":
            return f"{lead}.shortcut.{('convolution', 'normalization')[int(parts[3])]}.{parts[4]}"
        return f"{lead}.layer.{int(parts[2][-1]) - 1}.{kind[parts[2][:-1]]}.{parts[3]}"
    if parts[0] == "fc":
        return f"classifier.1.{parts[1]}"
    return f"resnet.embedder.embedder.{kind[parts[0][:-1]]}.{parts[1]}"


def theirs_of_vit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of timm's ViT as transformers has it."""
    found = {}
    plain = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
             "head": "classifier", "norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
             }  # fmt: skip
    for key, value in state.items():
        lead, _, kind = key.rpartition(".")
        if key in ("cls_token", "pos_embed"):
            found[f"vit.embeddings.{'cls_token' if key == 'cls_token' else 'position_embeddings'}"] = value
        elif lead.startswith("blocks."):
            _, number, layer = lead.split(".", 2)
            block = f"vit.encoder.layer.{number}"
            if layer == "attn.qkv":
                for part, each in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[f"{block}.attention.attention.{part}.{kind}"] = each.clone()
            else:
                found[f"{block}.{plain[layer]}.{kind}"] = value
        else:
            found[f"{plain[lead]}.{kind}"] = value
    return found


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_folders_of_transformers_are_recognised(tmp_path, name):
    network = timm.create_model(name, num_classes=3).eval()
    state = network.state_dict()
    theirs = theirs_of_vit(state) if name.startswith("vit") else {theirs_of_resnet(k): v for k, v in state.items()}
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in theirs.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}, "model_type": "x"}))
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    assert identify_network(tmp_path) == f"timm/{name}"
    assert read_checkpoint(tmp_path).class_names == ("a", "b", "c")
    loaded = load_weights(f"timm/{name}", str(tmp_path), 3, size=224)
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())
    assert loaded.normalisation == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))

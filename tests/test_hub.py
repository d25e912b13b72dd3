"""Names of models and data sets on the hub: which files are fetched, from which commit, and what is said without."""

import json
from pathlib import Path

import pytest
import torch

import potstill
from potstill import hub as client
from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError, UsageError
from potstill.export.loading import load_classifier
from potstill.hub import fetch_dataset, fetch_model, model_path, pinned_name
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, save_model

from .stand_in_hub import TOKEN


@pytest.fixture
def model(tmp_path):
    """The two files of a model folder."""
    classifier = Classifier(create_model("cifar/resnet8", 3, size=16), "cifar/resnet8", ("a", "b", "c"), InputSpec(16))
    save_model(classifier, tmp_path / "model")
    return {name: (tmp_path / "model" / name).read_bytes() for name in ("model.safetensors", "model.json")}


def forget(monkeypatch=None):
    fetch_model.cache_clear()
    fetch_dataset.cache_clear()
    if monkeypatch is not None:
        monkeypatch.setattr(client, "is_reachable", lambda url: False)


def test_a_model_is_loaded_from_one_commit(hub, model, monkeypatch, tmp_path):
    first = hub.put("me/small", model | {"README.md": b"card", "training.log": b"x" * 100})
    found = potstill.load("hf-hub:me/small")
    expected = potstill.load(tmp_path / "model")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(found.predict(images), expected.predict(images))
    assert pinned_name("hf-hub:me/small") == f"hf-hub:me/small@{first}"
    assert not any("README" in each or "training.log" in each for each in hub.requests)
    # A later commit changes nothing in this process, nor anything that names the first one.
    second = hub.put("me/small", {"model.json": b"{}"})
    assert pinned_name("hf-hub:me/small").endswith(first)
    forget()
    assert pinned_name("hf-hub:me/small").endswith(second)
    with pytest.raises(ArtifactError):
        potstill.load("hf-hub:me/small")
    hub.requests.clear()
    assert potstill.load(f"hf-hub:me/small@{first}").class_names == ("a", "b", "c")
    assert hub.requests == []  # what a commit names is in the cache
    # Without network the branch is what it was last.
    forget(monkeypatch)
    assert pinned_name("hf-hub:me/small").endswith(second)


def test_files_of_timm_and_transformers(hub):
    hub.put(
        "a/b", {"config.json": b"{}", "pytorch_model.bin": b"p", "model.safetensors": b"s", "flax_model.msgpack": b""}
    )
    assert {path.name for path in model_path("hf-hub:a/b").iterdir()} == {"config.json", "model.safetensors"}
    hub.put("a/c", {"config.json": b"{}", "pytorch_model.bin": b"p", "preprocessor_config.json": b"{}"})
    assert fetch_model("hf-hub:a/c").files == ("config.json", "pytorch_model.bin", "preprocessor_config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:a/none", "hides it; if it is private, log in with `hf auth login` or set HF_TOKEN"),
        ("hf-hub:a/private", "if it is private, log in"),
        ("hf-hub:a/gated", "access must be granted first"),
        ("hf-hub:a/text@v9", "no such revision"),
        ("hf-hub:a/text", "holds no model that can be read.*it has README.md, notes.txt"),
        ("hf-hub:a/b/c", "a repository is USER/NAME"),
        ("hf-hub:../../etc", "a repository is USER/NAME"),
        ("hf-hub:", "a repository is USER/NAME"),
    ],
)
def test_what_cannot_be_fetched_is_one_message(hub, name, message):
    hub.put("a/text", {"README.md": b"", "notes.txt": b""})
    hub.put("a/private", {"model.json": b""})
    hub.put("a/gated", {"model.json": b""})
    hub.repositories["models", "a/private"].private = True
    hub.repositories["models", "a/gated"].gated = True
    with pytest.raises(UsageError, match=message) as caught:
        fetch_model(name)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_token_opens_what_is_private(hub, model, monkeypatch):
    hub.put("a/private", model)
    hub.repositories["models", "a/private"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert potstill.load("hf-hub:a/private").architecture == "cifar/resnet8"


def test_without_network(hub, model, monkeypatch):
    hub.put("me/small", model)
    forget(monkeypatch)
    with pytest.raises(UsageError, match=r"not in the cache.*the hub cannot be reached.\nRun `hf download me/small`"):
        potstill.load("hf-hub:me/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        potstill.load("hf-hub:me/small")
    assert hub.requests == []


def test_code_of_a_stranger_is_not_run(hub, tmp_path):
    body = {"schema": 1, "architecture": "os:getcwd", "class_names": ["a", "b"], "facts": {}, "sha256": "0" * 64}
    body["input"] = {"size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    from potstill.io import write_checksummed_json

    write_checksummed_json(tmp_path / "model.json", body)
    hub.put("a/evil", {"model.json": (tmp_path / "model.json").read_bytes(), "model.safetensors": b""})
    with pytest.raises(ArtifactError, match="--allow-code"):
        potstill.load("hf-hub:a/evil")


def test_local_folders(model, tmp_path):
    assert potstill.load(f"local-dir:{tmp_path / 'model'}").class_names == ("a", "b", "c")
    with pytest.raises(UsageError, match="does not exist"):
        potstill.load("local-dir:nowhere")
    assert model_path("local-dir:~/x") == Path.home() / "x"
    assert json.loads(model["model.json"])["architecture"] == "cifar/resnet8"


def test_data_sets(hub, monkeypatch):
    files = {f"data/train-0000{i}-of-00002.parquet": b"p" for i in range(2)}
    sha = hub.put("u/pictures", files | {"README.md": b""}, "datasets")
    found = fetch_dataset("hf://datasets/u/pictures")
    assert found.files == tuple(files)
    assert found.name == f"hf://datasets/u/pictures@{sha}"
    hub.put("u/table", {"train.csv": b""}, "datasets")
    with pytest.raises(UsageError, match=r"has no Parquet files; it has train\.csv"):
        fetch_dataset("hf://datasets/u/table@main")
    # The hub converts other formats into a branch of its own.
    hub.put("u/table", {"default/train/0000.parquet": b"p"}, "datasets", branch="refs/convert/parquet")
    assert fetch_dataset("hf://datasets/u/table").files == ("default/train/0000.parquet",)
    with pytest.raises(UsageError, match="an address of data is hf://datasets/USER/NAME"):
        fetch_dataset("hf://u/pictures")
    # One of several configurations: a folder of the repository, or of that branch.
    files = {f"{name}/train-00000-of-00001.parquet": name.encode() for name in ("cats", "cats-large", "dogs")}
    both = hub.put("u/several", files, "datasets")
    cats = fetch_dataset("hf://datasets/u/several/cats")
    assert cats.files == ("cats/train-00000-of-00001.parquet",)
    assert cats.name == f"hf://datasets/u/several@{both}/cats"
    assert fetch_dataset(cats.name).files == cats.files
    with pytest.raises(UsageError, match=r"no table in dog/.*'dogs'.*; there are cats, cats-large, dogs"):
        fetch_dataset("hf://datasets/u/several/dog")
    hub.put("u/table", {"small/train/0000.parquet": b"p", "large/train/0000.parquet": b"p"}, "datasets",
            branch="refs/convert/parquet")  # fmt: skip
    fetch_dataset.cache_clear()
    assert fetch_dataset("hf://datasets/u/table/large").files == ("large/train/0000.parquet",)
    assert fetch_dataset("hf://datasets/u/table@refs/convert/parquet/small").files == ("small/train/0000.parquet",)
    # A download that was cut short is not taken for the whole.
    (found.folder / "data" / "train-00001-of-00002.parquet").unlink()
    forget(monkeypatch)
    with pytest.raises(UsageError, match="cannot be reached"):
        fetch_dataset(f"hf://datasets/u/pictures@{sha}")


def test_what_timm_saves_for_the_hub(hub, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3).eval()
    timm.models.save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "timm").iterdir()}
    sha = hub.put("u/timm", files)
    found, origin = load_classifier("hf-hub:u/timm")
    assert (found.architecture, origin) == ("timm/resnet10t", f"hf-hub:u/timm@{sha}")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.module(images), network(images))
    recipe = load_recipe("quickstart", flags={"--teacher": "hf-hub:u/timm"})
    assert recipe.teacher_list[0].model == "timm/resnet10t"
    assert recipe.teacher_list[0].weights == f"hf-hub:u/timm@{sha}"

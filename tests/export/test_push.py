"""`potstill push` and the way back, with a stand-in for the hub on this machine."""

import json
import shutil

import pytest
import torch
import yaml

import potstill
from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.errors import UsageError
from potstill.hub import fetch_model
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.report.text_reports import without_folders

from ..conftest import few_digits, short_runs
from ..stand_in_hub import TOKEN


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on files below a folder of this machine."""
    folder = tmp_path_factory.mktemp("push")
    with short_runs(), few_digits():
        changes = ("training.epochs=1", "teacher.training.epochs=2", "teacher.model=cifar/resnet8", "data.size=8")
        return potstill.run("quickstart", overrides=changes, output_dir=folder, name="small")


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def cli(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    return code, *capsys.readouterr()


def test_there_and_back(hub, trained, token, capsys, tmp_path):
    code, out, _ = cli(capsys, "push", trained, "me/small", "--private")
    assert code == 0
    repository = hub.repositories["models", "me/small"]
    assert repository.private
    (sha,) = repository.commits
    assert f"/me/small/tree/{sha}" in out
    sent = repository.commits[sha]
    assert set(sent) == {"model.safetensors", "model.json", "recipe.yaml", "README.md"}
    assert sent["model.safetensors"] == (trained / "distilled" / "model.safetensors").read_bytes()
    card = sent["README.md"].decode()
    assert card.startswith("---\n")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "potstill"
    assert 'potstill.load("hf-hub:me/small")' in card
    assert "report.html" not in card  # it is not sent
    found, own = potstill.load("hf-hub:me/small"), potstill.load(trained)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(found.predict(images), own.predict(images))
    # As a teacher: by the commit, which the recipe records.
    recipe = load_recipe("quickstart", flags={"--teacher": "hf-hub:me/small", "--student": "cifar/resnet8"})
    assert recipe.teacher_list[0].weights == f"hf-hub:me/small@{sha}"
    assert recipe.teacher_list[0].model == "cifar/resnet8"
    code, out, err = cli(capsys, "evaluate", "hf-hub:me/small", "--data", "digits", "--json")
    assert code == 0
    assert json.loads(out)["model"] == f"cifar/resnet8 of hf-hub:me/small@{sha}"
    assert f"hf-hub:me/small is hf-hub:me/small@{sha}" in err
    changes = ("training.epochs=1", "data.size=8", "teacher.model=hf-hub:me/small", "teacher.weights=null")
    with short_runs(), few_digits():
        again = potstill.run("quickstart", overrides=changes, output_dir=tmp_path, name="again")
    taught = potstill.load(again / "teacher")
    assert taught.facts["weights"] == f"hf-hub:me/small@{sha}"
    assert torch.equal(taught.predict(images), own.predict(images))


def test_nothing_is_sent_in_a_dry_run(hub, trained, capsys):
    code, out, _ = cli(capsys, "push", trained, "me/small", "--dry-run")
    assert code == 0
    assert hub.requests == []
    for text in ("me/small", "model.safetensors", "model.json", "README.md", "library_name: potstill"):
        assert text in out


def test_a_repository_that_exists(hub, trained, token, capsys):
    hub.put("me/small", {"notes.txt": b"mine"})
    code, _, err = cli(capsys, "push", trained, "me/small")
    assert (code, len(hub.repositories["models", "me/small"].commits)) == (2, 1)
    assert "exists: to add a commit to it, --update" in err
    assert cli(capsys, "push", trained, "me/small", "--update")[0] == 0
    commits = list(hub.repositories["models", "me/small"].commits.values())
    assert len(commits) == 2
    assert commits[1]["notes.txt"] == b"mine"


def test_what_cannot_be_sent_is_one_message(hub, trained, capsys, monkeypatch, tmp_path):
    for repository, words in (("a/b/c", "a repository is NAME or USER/NAME"), ("", "an argument is empty")):
        code, _, err = cli(capsys, "push", trained, repository)
        assert (code, words in err) == (2, True), err
    assert "needs a token: log in with `hf auth login`" in cli(capsys, "push", trained, "me/small")[2]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token may not write there" in cli(capsys, "push", trained, "me/small")[2]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = cli(capsys, "push", trained, "other/small")
    assert (code, "the token may not write there: 403" in err) == (2, True), err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, _, err = cli(capsys, "push", trained, "me/small")
    assert (code, "http://127.0.0.1:9" in err, "nothing was sent" in err) == (2, True, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in cli(capsys, "push", trained, "me/small")[2]
    assert cli(capsys, "push", tmp_path / "gone", "me/small")[0] == 2
    assert "is no finished run" in cli(capsys, "push", trained / "distilled", "me/small")[2]
    assert hub.repositories == {}


def test_a_damaged_model_is_not_sent(hub, trained, token, capsys):
    weights = trained / "distilled" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert cli(capsys, "push", trained, "me/small")[0] == 4
    finally:
        weights.write_bytes(content)
    assert hub.repositories == {}


def test_folders_of_this_machine_are_not_sent(hub, trained, token, tmp_path):
    """Of an absolute path the last part is sent."""
    from potstill.export.push import prepare

    with short_runs(), few_digits():
        changes = ("training.epochs=1", "data.size=8", f"teacher.weights={trained}", "teacher.model=null")
        run = potstill.run("quickstart", overrides=changes, output_dir=tmp_path, name="second")
    assert str(tmp_path.parent) in (run / "recipe.yaml").read_text()
    publication = prepare(run, "me/second")
    for name, content in publication.files.items():
        assert b"pytest-of" not in content, name
    assert yaml.safe_load(publication.files["recipe.yaml"])["teacher"]["weights"] == "teacher"
    paths = {"a": ["/home/me/x.pth", r"C:\data\x", "mine.py:f", "/home/me/mine.py:f"], "b": 3, "c": "/"}
    assert without_folders(paths) == {"a": ["x.pth", "x", "mine.py:f", "mine.py:f"], "b": 3, "c": "/"}


def test_a_teacher_of_the_hub_that_is_none(hub):
    hub.put("a/text", {"README.md": b""})
    with pytest.raises(UsageError, match=r"teacher\.weights: hf-hub:a/text holds no model"):
        load_recipe("quickstart", flags={"--teacher": "hf-hub:a/text"})
    with pytest.raises(UsageError, match="no such repository"):
        load_recipe("quickstart", ["student.model=hf-hub:a/none"])
    assert fetch_model.cache_info().currsize == 0


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224"])
def test_students_of_timm_are_loaded_by_timm_alone(trained, tmp_path, architecture):
    """From a folder with the files that are sent, without model.json."""
    timm = pytest.importorskip("timm")
    from potstill.export.push import timm_config

    spec = InputSpec(64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), crop_share=0.9)
    network = create_model(architecture, 3, size=64).eval()
    save_model(Classifier(network, architecture, ("a", "b", "c"), spec), tmp_path)
    config = timm_config(load_model(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.json").unlink()
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(found(images), network(images))
    assert found.pretrained_cfg["label_names"] == ["a", "b", "c"]
    transform = timm.data.resolve_model_data_config(found)
    assert (transform["crop_pct"], transform["crop_mode"], transform["interpolation"]) == (0.9, "center", "bilinear")
    assert (tuple(transform["mean"]), tuple(transform["std"])) == (spec.mean, spec.std)
    # Other networks get no such file, and neither do students that a method has changed.
    assert timm_config(load_model(trained / "distilled")) is None
    changed = Classifier(network, architecture, ("a", "b", "c"), spec, remodelled={"name": "simkd"})
    assert timm_config(changed) is None
    pruned = Classifier(network, architecture, ("a", "b", "c"), spec, pruned={"conv1": {"out_channels": 8}})
    assert timm_config(pruned) is None


def test_what_is_sent_of_a_student_of_timm(hub, trained, token, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    network = create_model("resnet10t", 10, size=32).eval()
    names = load_model(trained / "distilled").class_names
    save_model(Classifier(network, "resnet10t", names, InputSpec(32)), run / "distilled")
    assert cli(capsys, "push", run, "me/timm")[0] == 0
    ((_, sent),) = hub.repositories["models", "me/timm"].commits.items()
    assert json.loads(sent["config.json"])["architecture"] == "resnet10t"
    assert 'timm.create_model("hf-hub:me/timm", pretrained=True)' in sent["README.md"].decode()
    found = potstill.load("hf-hub:me/timm")  # by model.json, which is there too
    assert found.class_names == names


def test_export_takes_names_of_the_hub(hub, trained, token, capsys, tmp_path, monkeypatch):
    """To the format that is made in the shortest time: the names are the same for all of them."""
    monkeypatch.chdir(tmp_path)
    form = ("--data", "digits", "--format", "torch-export")
    assert cli(capsys, "push", trained, "me/small")[0] == 0
    code, out, err = cli(capsys, "export", "hf-hub:me/small", *form)
    assert code == 0, err
    assert "export: model.pt2" in out  # not into the cache of the hub's client
    code, _, err = cli(capsys, "export", f"local-dir:{trained}", *form, "--output", "local.pt2")
    assert code == 0, err
    (sha,) = hub.repositories["models", "me/small"].commits
    facts, own = (json.loads((tmp_path / name).read_text()) for name in ("model.pt2.json", "local.pt2.json"))
    assert facts["stage"] == f"hf-hub:me/small@{sha}"
    assert facts["model_sha256"] == own["model_sha256"]
    assert (tmp_path / "local.pt2").is_file()
    code, _, err = cli(capsys, "export", "hf-hub:me/none", *form)
    assert (code, "hf-hub:me/none" in err) == (2, True)
    code, _, err = cli(capsys, "export", "hf-hub:me/small")
    assert (code, "name them: --data DIR" in err) == (3, True)

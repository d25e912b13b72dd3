"""`potstill federated` as a user types it: what is done, and each mistake as one message."""

from pathlib import Path
from typing import Any

import pytest

from potstill.cli import main
from potstill.io import read_checksummed_json

SMALL = [
    "federated", "run", "quickstart", "--student", "cifar/resnet8", "--rounds", "1", "--public-epochs", "1",
    "--set", "data.size=8", "--set", "training.threads=1", "--set", "training.precision=float32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_students_a_record_and_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--clients", "2", "--partition", "iid", "--algorithms", "fedavg,feddf"]) == 0
    shown = capsys.readouterr().out
    folder = here / "runs" / "quickstart-federated"
    found: dict[str, Any] = read_checksummed_json(folder / "federated.json")
    assert (
        sum(each["images"] for each in found["clients"]) + found["public"] == 1259
    )  # of 1,797, less 269 each of val and test
    assert found["public"] == 252
    for name in ("fedavg", "feddf"):
        assert (folder / name / "model.safetensors").exists()
        assert not (folder / name / "rounds.checkpoint").exists()
        assert f"{found['trained'][name]['test']['top1']:.1%}" in shown
    val = {name: found["trained"][name]["val"]["top1"] for name in ("fedavg", "feddf")}
    assert val["fedavg"] != val["feddf"]
    assert f"predict {Path('runs/quickstart-federated') / max(val, key=val.get)} IMAGE" in shown
    sent = {name: found["trained"][name]["bytes_per_round"]["up"] for name in ("fedavg", "feddf")}
    assert sent["feddf"] == sent["fedavg"] > 2 * 78_042 * 4  # two clients
    assert main([*SMALL, "--clients", "2", "--partition", "iid", "--algorithms", "fedavg,feddf"]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--partition", "dirichlet"], "needs a number above 0, such as dirichlet:0.3, got 'dirichlet'"),
        (["--partition", "dirichlet:-1"], "needs a number above 0"),
        (["--partition", "evenly"], "--partition is iid, dirichlet:ALPHA"),
        (["--algorithms", "fedavgg"], "no algorithm 'fedavgg'; did you mean 'fedavg'?"),
        (["--algorithms", "fedavg,fedavg"], "at most once"),
        (["--baselines", "centre"], "no baseline 'centre'"),
        (["--clients", "900"], "cannot be divided among 900 clients with 2 or more each"),
        (["--clients", "0"], "--clients must be at least 1, got 0"),
        (["--public", "0.0001"], "images public: at least 2 must be"),
        (["--algorithms", "guided"], "the server needs one trained teacher: --teacher RUN"),
        (["--algorithms", "guided", "--teacher", "runs/no"], "an existing run; got runs/no without weights"),
        (["--public", "0", "--algorithms", "fedavg,feddf"], "needs public images: data.unlabeled, or --public SHARE"),
        (["--set", "data.class_balance=weights", "--set", "seeds=3"], "federated rounds cannot train this recipe:"),
        (["--max-share", "0.2"], "--max-share of one client in an average is from 0.5 to 1, got 0.2"),
    ],
)
def test_a_mistake_is_one_message(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main([*SMALL, *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert not list(here.rglob("*.safetensors"))  # and before anything is trained


def test_folders_of_clients(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--partition", "folders:nowhere"]) == 2
    assert "nowhere: no such folder; it must hold one folder for each client" in capsys.readouterr().err
    (here / "clients" / "one" / "0").mkdir(parents=True)
    assert main([*SMALL, "--partition", "folders:clients", "--overwrite"]) == 3
    assert "client 0: " in (shown := capsys.readouterr().err)
    assert "this client has 0 training images, and needs at least 2" in shown


def test_the_app_names_ours_and_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    assert main(["federated", "app", "quickstart", "app"]) == 0
    found = tomllib.loads((here / "app" / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert found["components"] == {"serverapp": "potstill_app:server", "clientapp": "potstill_app:client"}
    assert found["config"]["recipe"] == "quickstart"
    compile((here / "app" / "potstill_app.py").read_text(encoding="utf-8"), "potstill_app.py", "exec")
    capsys.readouterr()
    assert main(["federated", "app", "quickstart", "app"]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err

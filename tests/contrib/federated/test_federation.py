import shutil

import numpy as np
import pytest
from PIL import Image

from potstill.contrib.federated import ALGORITHMS, parse_names
from potstill.contrib.federated.federation import FederationOptions, best_algorithm, federate, format_table
from potstill.contrib.federated.partition import Partition
from potstill.contrib.federated.server import Schedule, Server
from potstill.errors import UsageError
from potstill.io import read_checksummed_json
from potstill.training.callbacks import SilentObserver


def entry(top1, nll, test):
    return {"val": {"top1": top1, "nll": nll}, "test": {"top1": test, "nll": 1.0}}


def test_the_best_algorithm_is_that_of_val_and_not_of_test_or_of_order():
    trained = {"fedavg": entry(0.7, 1.0, 0.5), "feddf": entry(0.6, 0.1, 0.9), "guided": entry(0.7, 1.2, 0.8)}
    assert best_algorithm({"trained": trained}, ["feddf", "guided", "fedavg"]) == "fedavg"


def test_the_weights_of_a_run_that_is_resumed_are_those_of_one_that_was_not(tmp_path, recipe, data, monkeypatch):
    """Killed after the first algorithm; the second one and the options are as before, and other options are refused."""
    options = FederationOptions(
        2, Partition(), ("fedavg", "feddf"), ("alone", "central"), 0.2, Schedule(rounds=2, public_epochs=1)
    )
    whole = federate(recipe(), options, output_dir=tmp_path, name="whole", data=data)
    train = Server.train

    def killed(self, observer, progress=None, save=None):
        if self.algorithm is ALGORITHMS["feddf"]:
            raise KeyboardInterrupt
        return train(self, observer, progress, save)

    monkeypatch.setattr(Server, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        federate(recipe(), options, output_dir=tmp_path, name="again", data=data)
    monkeypatch.undo()
    other = FederationOptions(2, Partition(0.5), ("fedavg",), (), 0.2, Schedule(rounds=3))
    with pytest.raises(UsageError, match=r"partition was iid and is dirichlet:0.5; .*rounds was 2 and is 3"):
        federate(recipe(), other, output_dir=tmp_path, name="again", data=data, resume=True)
    again = federate(recipe(), options, output_dir=tmp_path, name="again", data=data, resume=True)
    for name in ("fedavg", "feddf", "central", "alone-0"):
        files = [(run / name / "model.safetensors").read_bytes() for run in (whole, again)]
        assert files[0] == files[1], name
    found = read_checksummed_json(again / "federated.json")
    assert found["alone"]["n"] == 2
    lines = format_table(found)
    assert [line.split()[0] for line in lines[1:]] == ["fedavg", "feddf", "central", "alone"]


def test_images_of_client_folders_are_those_of_before_and_not_of_test(tmp_path, recipe):
    draws = np.random.default_rng(0)
    for folder, count in (
        ("server/train", 3),
        ("server/val", 3),
        ("server/test", 3),
        ("clients/a", 4),
        ("clients/b", 4),
    ):
        for label in ("cat", "dog"):
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / label / f"{i}.png")
    shutil.copy(tmp_path / "server/test/cat/0.png", tmp_path / "clients/b/cat/known.png")

    class Listener(SilentObserver):
        def warn(self, message):
            heard.append(message)

    heard = []
    options = FederationOptions(None, Partition(folders=tmp_path / "clients"), ("fedavg",), (), 0.2, Schedule(rounds=1))
    own, root = recipe(**{"data.source": str(tmp_path / "server")}), {"output_dir": tmp_path, "name": "f"}
    run = federate(own, options, observer=Listener(), **root)
    assert [each for each in heard if "content of images of the server's val or test" in each] == [
        "client 1 trains on 1 images with the content of images of the server's val or test: their figures are too high"
    ]
    assert federate(own, options, resume=True, **root) == run
    Image.fromarray(255 - pixels).save(tmp_path / "clients/b/dog/3.png")
    with pytest.raises(UsageError, match="those of client 1 are different"):
        federate(own, options, resume=True, **root)


def test_names_are_known_and_given_once():
    with pytest.raises(UsageError, match="no algorithm 'fedav'; did you mean 'fedavg'"):
        parse_names("fedav", ALGORITHMS, "algorithm")
    with pytest.raises(UsageError, match=r"--algorithms: name each of fedavg, .* at most once; got 'feddf,feddf'"):
        parse_names("feddf,feddf", ALGORITHMS, "algorithm")

"""Flower's own simulation gives what this process gives; needs Flower and Ray."""

import gc

import numpy as np
import pytest
import torch

from potstill.contrib.federated import federation
from potstill.contrib.federated.client import Client
from potstill.contrib.federated.federation import (
    FederationOptions,
    check_flower_installed,
    federate,
    parse_engine,
    simulate,
)
from potstill.contrib.federated.server import InProcessClients
from potstill.data.image_sets import Subset
from potstill.errors import UsageError
from potstill.training.callbacks import SilentObserver


def test_engines_by_name():
    assert [parse_engine(name) for name in ("process", "flower")] == ["process", "flower"]
    with pytest.raises(UsageError, match=r"process or flower, got 'flowers'; did you mean 'flower'\?"):
        parse_engine("flowers")


def test_without_flower_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(federation, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no flwr and no ray: pip install 'potstill\[federated\]'"):
        check_flower_installed()


def test_a_simulation_is_not_resumed(monkeypatch, tmp_path, recipe, data):
    monkeypatch.setattr(federation, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="--resume goes on with --engine process only"):
        federate(recipe(), FederationOptions(), root=tmp_path, data=data, engine="flower", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def flower():
    """Flower and Ray are there; what Ray leaves behind is cleared away while its warnings do not count."""
    for package in ("flwr", "ray"):
        pytest.importorskip(package, reason="needs the extra federated")
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_weights_are_those_of_this_process(flower, recipe, data, public, parts):
    def clients():
        cut = np.array_split(np.arange(len(data.train)), 2)
        return {
            number: Client(lambda classes, part=part: Subset(data.train, part), lambda: public)
            for number, part in enumerate(cut)
        }

    for name in ("fedavg", "fedmd"):  # fedmd's clients keep their networks for themselves
        here = parts.server(name, recipe(), data, InProcessClients(clients()), public=public, rounds=2)
        there = parts.server(name, recipe(), data, InProcessClients({}), public=public, rounds=2)
        found = {}

        def work(grid, there=there, found=found):
            there.clients = grid
            there.handshake()
            found["records"] = there.carry_out(SilentObserver()).records

        records = here.carry_out(SilentObserver()).records
        simulate(clients(), work)
        for key in ("val", "clients", "bytes_up", "bytes_down"):
            assert [each[key] for each in found["records"]] == [each[key] for each in records], key
        for key, value in here.student.module.state_dict().items():
            assert torch.equal(value, there.student.module.state_dict()[key]), (name, key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_goes_wrong_in_the_work_comes_out(flower):
    def work(grid):
        raise UsageError("a mistake that a person can mend")

    with pytest.raises(UsageError, match="that a person can mend"):
        simulate({0: Client(lambda classes: None)}, work)

"""The benchmarks stand beside the package and are no part of it: tests find them in the repository."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
if str(REPOSITORY) not in sys.path:
    sys.path.append(str(REPOSITORY))

TINY = "--images 10 --pixels 32 --size 32 --rounds 2 --teacher cifar/resnet8"


@pytest.fixture
def measured(monkeypatch, capsys):
    """What ``python -m benchmarks.speed NAME ...`` prints on tiny input; torch keeps its number of threads."""
    import torch
    from benchmarks.speed.__main__ import main

    threads = torch.get_num_threads()

    def run(name, arguments="", *, tiny=TINY):
        monkeypatch.setattr(sys, "argv", ["speed", name, *tiny.split(), *arguments.split()])
        main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)

"""One thread and one seed: no test depends on the machine's cores or on luck."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)

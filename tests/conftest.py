"""One thread: the tensors here are small, and results must not depend on the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the processes that tests start

"""What all tests share: one thread, so that timings and sums do not depend on the machine's load."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("POSTERN_TEST_THREADS", "1")))

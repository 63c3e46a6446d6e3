"""What all tests share: one thread and no deadlines, so that they do not depend on the machine's load."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("postern", deadline=None)
settings.load_profile("postern")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("POSTERN_TEST_THREADS", "1")))

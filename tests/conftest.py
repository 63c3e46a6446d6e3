"""What all tests share: one thread and no deadlines, so that they do not depend on the machine's load."""

import os
import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("postern", deadline=None)
settings.load_profile("postern")


# A shell's background jobs ignore Ctrl-C and hand that on; the tests that press it need it to work.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("POSTERN_TEST_THREADS", "1")))

"""Every test: one thread (many tiny operations, several workers), and a cache of its own instead of the user's."""
import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quiet_machine(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ["FEWSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))

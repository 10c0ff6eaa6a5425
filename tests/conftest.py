"""Every test: one thread, a cache of its own instead of the user's, no network.

One thread because operations are tiny and several workers share the machine.
"""

import os
import urllib.request

import pytest
import torch

from scripts import tiny_teacher


def _offline(url, timeout):
    raise OSError("tests have no network")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of one test alone; `pytestmark = pytest.mark.usefixtures("cache")`: of each test."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A teacher of digits that costs far less than the shipped one, for runs of whole scripts."""
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """No test depends on which precision this machine is faster in; test_precision.py asks."""
    monkeypatch.setattr("common.precision.has_bf16", lambda device: False)


@pytest.fixture(autouse=True, scope="session")
def _quiet_machine(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start
    os.environ["FEWSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    urllib.request.urlopen = _offline

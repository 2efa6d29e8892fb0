"""What all tests share. One thread a test process: tests run side by side, and threads that wait for busy cores make
them crawl."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A busy machine is no defect.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

torch.set_num_threads(1)
# For the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def e88_cache(tmp_path_factory, monkeypatch):
    """Prepared data goes to the tests' folder, never to the user's."""
    monkeypatch.setenv("E88_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text file that no test changes."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(4000)))
    return path


@pytest.fixture
def poison():
    """Uninitialised memory holds NaN, so that a number nobody wrote cannot pass."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def passed_in_the_interpreter():
    """Runs a file's tests in a process of their own, where Triton's interpreter takes CPU tensors; how many passed."""

    def run(file):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu", file]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stdout
        return int(re.search(r"(\d+) passed", done.stdout)[1])

    return run

"""What all tests share. One thread a test process: tests run side by side, and threads that wait for busy cores make
them crawl."""

import os

import pytest
import torch

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

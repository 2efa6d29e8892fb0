"""Processes that tests of studies start and kill."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from scheduling import children


@pytest.fixture
def popen() -> Any:
    """Start processes that do not outlive the test, nor do their children."""
    started: list[subprocess.Popen[Any]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        for child in children(process.pid):
            os.kill(child, 9)
        process.kill()
        process.wait()

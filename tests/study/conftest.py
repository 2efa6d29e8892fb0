"""Processes that tests of studies start and kill."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest


@pytest.fixture
def popen() -> Any:
    """Start processes that do not outlive the test."""
    started: list[subprocess.Popen[Any]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()

"""`e88 bench` and `e88 study` as commands: interruption, going on, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from e88.study.store import Store


def test_interrupting_stops_with_a_checkpoint_and_the_same_command_goes_on(
    spec: Any, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = spec("long", steps=600)
    command = [sys.executable, "-m", "e88", "bench", source, "--data", text, "--device", "cpu", "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in out.glob("runs/*/log.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert not Store(out).records()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "done" and record["results"]["steps"] == 600 and record["curve"]
    assert (out / "report.html").exists()

import sys

import pytest

SPEC = """
[model]
dim = 16
depth = 2
{vocabulary}
[model.mixer]
kind = "e88"
n_heads = 2
n_state = 8
[training]
batch_size = 4
window = 16
heldout_bytes = 2000
lr = {lr}
budget = {{steps = {steps}}}
{extra}
"""


@pytest.fixture
def spec(tmp_path):
    """Write a TOML file of a tiny run and return its path."""

    def write(name="small", *, lr=1e-2, steps=4, extra="", vocabulary=""):
        path = tmp_path / f"{name}.toml"
        path.write_text(SPEC.format(lr=lr, steps=steps, extra=extra, vocabulary=vocabulary))
        return path

    return write


@pytest.fixture
def e88(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""
    from e88.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["e88", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

"""What a record says about where it came from."""

import importlib.util
import shutil
import subprocess

import pytest

from e88 import runtime


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_the_package_and_not_of_a_project_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    copy = tmp_path / "libraries" / "runtime.py"
    copy.parent.mkdir()
    copy.write_bytes(open(runtime.__file__, "rb").read())
    spec = importlib.util.spec_from_file_location("copied_runtime", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commit = module.commit.__wrapped__
    monkeypatch.delenv("E88_COMMIT", raising=False)
    git("init", "--quiet")
    (tmp_path / "theirs.txt").write_text("theirs")
    git("add", "theirs.txt")
    git("commit", "--quiet", "-m", "theirs")
    assert commit() is None
    monkeypatch.setenv("E88_COMMIT", "0123abc")
    assert commit() == "0123abc"
    git("add", "libraries")
    git("commit", "--quiet", "-m", "ours")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
    copy.write_text(copy.read_text() + "\n")
    assert commit().endswith("-dirty")

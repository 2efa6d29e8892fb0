"""Prepared folders: whole or absent, portable, verified; any number of processes at once."""

import errno
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from e88.data import corpus as corpus_module
from e88.data import store
from e88.data.corpus import open_corpus
from e88.errors import UserError


def run(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


KILLED = """
import os, sys
from pathlib import Path
from e88.data import prepare
from e88.data.corpus import open_corpus
prepare.Meta.write = lambda *_: os.kill(os.getpid(), 9)
open_corpus(sys.argv[1], cache=Path(sys.argv[2]))
"""

BUILD = """
import os, sys, time
from pathlib import Path
from e88.data import prepare
from e88.data.corpus import open_corpus
write = prepare.Meta.write
def slow(self, folder):
    with open(sys.argv[3], "ab", 0) as log:
        log.write(b"built\\n")
    time.sleep(0.3)
    write(self, folder)
prepare.Meta.write = slow
corpus = open_corpus(sys.argv[1], cache=Path(sys.argv[2]))
corpus.verify()
print(corpus.hash)
"""


def test_killed_preparation_is_not_believed_and_is_cleaned_up(folder, cache):
    assert run(KILLED, folder, cache).wait() == -signal.SIGKILL
    (left,) = (p for p in cache.iterdir() if p.is_dir())
    assert (left / "train.bin").stat().st_size > 0
    corpus = open_corpus(folder, cache=cache)
    corpus.verify()
    assert not left.exists() and len(list(cache.iterdir())) == 2


def test_processes_at_once_build_once_and_agree(folder, cache, tmp_path):
    log = tmp_path / "log"
    processes = [run(BUILD, folder, cache, log) for _ in range(4)]
    hashes = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert hashes == {open_corpus(folder, cache=cache).hash + "\n"}
    assert log.read_text() == "built\n"
    assert len(list(cache.iterdir())) == 2


def test_without_locks_the_quicker_process_wins(folder, cache, monkeypatch):
    open_corpus(folder, cache=cache)
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    monkeypatch.setattr(store, "_lock", lambda descriptor: False)
    made = []

    def build(temporary):
        shutil.copytree(entry, temporary, dirs_exist_ok=True)
        shutil.copytree(entry, cache / "key")
        made.append((cache / "key").stat().st_ino)

    assert store.cached(cache, "key", build).stat().st_ino == made[0]
    assert not list(cache.glob("*.tmp-*"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "no description", "half a description", "other description"])
def test_damaged_cache_entry_is_rebuilt_and_damaged_folder_refused(folder, cache, tmp_path, damage):
    reference = open_corpus(folder, cache=cache)
    reference.export(tmp_path / "out")
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    for root in (entry, tmp_path / "out"):
        meta = root / "e88-data.json"
        if damage == "truncate":
            (root / "train.bin").write_bytes((root / "train.bin").read_bytes()[:-1])
        elif damage == "remove":
            (root / "valid.bin").unlink()
        elif damage == "no description":
            meta.write_text("{}")
        elif damage == "half a description":
            meta.write_text(meta.read_text()[:200])
        else:
            meta.write_text(json.dumps({**json.loads(meta.read_text()), "hash": "0" * 64}))
    again = open_corpus(folder, cache=cache)
    again.verify()
    assert again.hash == reference.hash
    with pytest.raises(UserError, match="prepare") as error:
        open_corpus(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_export_is_self_contained(folder, cache, tmp_path):
    single = tmp_path / "text.txt"
    single.write_bytes(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.txt"))))
    for source in (folder, single):
        corpus = open_corpus(source, cache=cache)
        corpus.export(tmp_path / "out")
        content = [split[:].tobytes() for split in corpus.splits]
        shutil.rmtree(cache)
        shutil.move(tmp_path / "out", tmp_path / "moved")
        moved = open_corpus(tmp_path / "moved")
        moved.verify()
        assert moved.hash == corpus.hash and moved.name == corpus.name
        assert [split[:].tobytes() for split in moved.splits] == content
        assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == [
            "e88-data.json", "test.bin", "train.bin", "valid.bin",
        ]  # fmt: skip
        shutil.rmtree(tmp_path / "moved")


def test_export_replaces_only_prepared_folders(folder, cache, tmp_path):
    corpus = open_corpus(folder, cache=cache)
    out = tmp_path / "out"
    out.mkdir()
    corpus.export(out)
    (folder / "one more.txt").write_text("one more document")
    longer = open_corpus(folder, cache=cache)
    longer.export(out)
    assert open_corpus(out).hash == longer.hash != corpus.hash
    (out / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for target in (out, folder, folder / "a/00.txt", tmp_path / "missing" / "out"):
        with pytest.raises(UserError):
            corpus.export(target)
    assert sorted(tmp_path.rglob("*")) == before and open_corpus(out).hash == longer.hash


def test_export_that_fails_leaves_the_old_and_nothing_new(folder, cache, tmp_path, monkeypatch):
    corpus = open_corpus(folder, cache=cache)
    corpus.export(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    def full(path, pieces):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(corpus_module, "write_split", full)
    with pytest.raises(UserError, match="No space left on device"):
        corpus.export(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    open_corpus(tmp_path / "out").verify()


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    replace = store.os.replace

    def failing(source, destination):
        if destination == target and not (source / "old").exists():
            raise OSError(errno.EACCES, "Permission denied")
        replace(source, destination)

    monkeypatch.setattr(store.os, "replace", failing)
    with pytest.raises(OSError):
        store.publish(target, lambda folder: None)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_verify_notices_one_changed_byte(folder, cache, tmp_path):
    open_corpus(folder, cache=cache).export(tmp_path / "out")
    data = np.memmap(tmp_path / "out/valid.bin", dtype=np.uint8, mode="r+")
    data[len(data) // 2] ^= 1
    data.flush()
    with pytest.raises(UserError, match="valid split of folder is not what was prepared"):
        open_corpus(tmp_path / "out").verify()

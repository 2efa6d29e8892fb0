"""Files, folders and the standard library as corpora."""

import hashlib
import os
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.data import prepare, splitting
from e88.data.corpus import open_corpus
from e88.data.splitting import Document
from e88.errors import UserError


def split_documents(corpus):
    return {split.name: split[:].tobytes().split(b"\x1e") for split in corpus.splits}


def test_folder_is_split_by_file_and_every_file_is_in_one_split(folder, documents, cache):
    corpus = open_corpus(folder, cache=cache)
    found = split_documents(corpus)
    assert Counter(d for part in found.values() for d in part) == Counter(documents.values())
    assert all(found.values())
    total = sum(map(len, documents.values()))
    for split in (corpus.valid, corpus.test):
        assert 0.02 * total < split.bytes < 0.15 * total
    for split in corpus.splits:
        assert split.documents == len(found[split.name]) == split.separators + 1
        assert split.sha256 == hashlib.sha256(split[:].tobytes()).hexdigest()
        assert len(split) == split.bytes
    assert corpus.train[3:9].dtype == np.uint8


def test_split_and_hash_depend_on_content_alone(folder, documents, cache, tmp_path):
    corpus = open_corpus(folder, cache=cache)
    copy = tmp_path / "elsewhere"
    for name, content in reversed(documents.items()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    again = open_corpus(copy, cache=tmp_path / "other cache")
    assert again.hash == corpus.hash
    assert split_documents(again) == split_documents(corpus)
    (copy / "a/00.txt").write_bytes(b"another text")
    assert open_corpus(copy, cache=cache).hash != corpus.hash


def test_second_opening_reads_the_cache(folder, cache, monkeypatch):
    first = open_corpus(folder, cache=cache)
    monkeypatch.setattr(prepare, "documents", None)
    assert open_corpus(folder, cache=cache).hash == first.hash


def test_odd_files_are_left_out_and_counted(folder, documents, cache):
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("not read")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("not read")
    (folder / "copy.txt").write_bytes(documents["a/00.txt"])
    (folder / "dangling").symlink_to("nowhere")
    (folder / "a/loop").symlink_to(folder)
    (folder / "alias").symlink_to(folder / "a")
    os.mkfifo(folder / "pipe")
    corpus = open_corpus(folder, cache=cache)
    found = split_documents(corpus)
    assert Counter(d for part in found.values() for d in part) == Counter(documents.values())
    assert corpus.meta.left_out == {"empty": 1, "duplicate": 1, "unreadable": 1, "not a regular file": 1}


def test_file_that_fails_midway_leaves_nothing_of_itself(folder, documents, cache, monkeypatch):
    class Failing:
        def __init__(self):
            self.blocks = [b"half of it"]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            if self.blocks:
                return self.blocks.pop()
            raise OSError(5, "Input/output error")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: Failing() if p.name == "07.txt" else opened(p, *a, **k))
    corpus = open_corpus(folder, cache=cache)
    del documents["b/07.txt"]
    assert Counter(d for part in split_documents(corpus).values() for d in part) == Counter(documents.values())
    assert corpus.meta.left_out == {"unreadable": 1}


@pytest.mark.parametrize("suffix", ["", ".txt"])
def test_folder_with_named_splits_is_used_as_it_is(tmp_path, cache, suffix):
    contents = {"train-1": b"part two\x1ethree", "train-0": b"part one", "validation": b"same", "test": b"same"}
    source = tmp_path / "source"
    source.mkdir()
    for name, content in contents.items():
        (source / f"{name}{suffix}").write_bytes(content)
    (source / "README.md").write_text("about")
    corpus = open_corpus(source, cache=cache)
    assert corpus.train[:].tobytes() == b"part one\x1epart two\x1ethree"
    assert corpus.valid[:].tobytes() == corpus.test[:].tobytes() == b"same"
    assert [split.documents for split in corpus.splits] == [3, 1, 1]
    assert corpus.meta.left_out == {"outside the named splits": 1}


def test_plain_file_is_used_in_place(tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = open_corpus(path, cache=cache)
    assert b"".join(split[:].tobytes() for split in corpus.splits) == path.read_bytes()
    assert all(split[:].tobytes().endswith(b"\n") for split in corpus.splits)
    assert [p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == ["e88-data.json"]
    assert open_corpus(str(path), cache=cache).hash == corpus.hash
    path.write_text("".join(f"line {i + 1}\n" for i in range(1000)))
    assert open_corpus(path, cache=cache).hash != corpus.hash


def test_binary_file_keeps_every_byte(tmp_path, cache):
    content = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    content[content == 0x1E] = 0
    path = tmp_path / "weights.bin"
    content.tofile(path)
    corpus = open_corpus(path, cache=cache)
    assert np.array_equal(np.concatenate([split[:] for split in corpus.splits]), content)
    assert corpus.describe() == {
        "name": "weights.bin", "hash": corpus.hash, "train_bytes": len(corpus.train),
        "valid_bytes": len(corpus.valid), "test_bytes": len(corpus.test), "vocab_size": 256,
        "bytes_per_token": 1.0, "tokenizer": "bytes",
    }  # fmt: skip
    assert corpus.decode(corpus.encode(content.tobytes())) == content.tobytes()
    assert np.array_equal(corpus.bytes_of(np.zeros((2, 3), dtype=np.int64)), np.ones((2, 3)))


@given(st.binary(min_size=3, max_size=3000), st.integers(0, 5))
def test_cut_loses_nothing_but_separators_between_parts(content, shift):
    data = np.frombuffer(b"#" * shift + content, dtype=np.uint8)
    spans = splitting.cut(data, shift, len(data))
    (a, b), (c, d), (e, f) = spans["train"], spans["valid"], spans["test"]
    assert a == shift and f == len(data) and a < b <= c < d <= e < f
    assert set(bytes(data[b:c]) + bytes(data[d:e])) <= {0x1E} and c - b <= 1 and e - d <= 1
    held = splitting.held_out_bytes(len(content))
    assert held - held // 2 - 1 <= d - c <= held + held // 2 and f - e <= held


def test_file_of_documents_is_cut_between_documents(tmp_path, cache, documents):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\x1e".join(documents.values()))
    corpus = open_corpus(path, cache=cache)
    found = split_documents(corpus)
    assert sum(found.values(), []) == list(documents.values())
    assert [split.documents for split in corpus.splits] == [len(found[split.name]) for split in corpus.splits]


@given(st.text(alphabet="aé日\x1e\n", min_size=200, max_size=2000))
def test_cut_is_between_characters(text):
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    for start, stop in splitting.cut(data, 0, len(data)).values():
        bytes(data[start:stop]).decode()


@given(st.lists(st.integers(1, 5000), min_size=3, max_size=60))
def test_every_document_is_in_one_split_and_none_is_empty(sizes):
    documents, start = [], 0
    for i, size in enumerate(sizes):
        documents.append(Document(f"{i}", start, size, hashlib.sha256(b"%d" % i).digest()))
        start += size
    data = np.zeros(start, dtype=np.uint8)
    spans = splitting.plan(documents, data, Counter()).spans
    assert sorted(span for part in spans.values() for span in part) == [d.span for d in documents]
    assert all(spans.values())
    assert spans == splitting.plan(documents[::-1], data, Counter()).spans


def test_held_out_documents_are_small_and_many(tmp_path, cache):
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    for i, size in enumerate([200_000] * 4 + [2_000] * 200):
        rng.integers(0, 256, size, dtype=np.uint8).tofile(source / f"{i}.bin")
    corpus = open_corpus(source, cache=cache)
    for split in (corpus.valid, corpus.test):
        assert split.documents > 10 and 40_000 < split.bytes < 80_000


def test_two_files_are_each_cut(tmp_path, cache):
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        (source / name).write_bytes(name.encode() * 1000)
    corpus = open_corpus(source, cache=cache)
    assert split_documents(corpus) == {
        "train": [b"a" * 900, b"b" * 900], "valid": [b"a" * 50, b"b" * 50], "test": [b"a" * 50, b"b" * 50],
    }  # fmt: skip


def test_standard_library_is_the_default_every_machine_has(cache, tmp_path):
    corpus = open_corpus("stdlib", cache=cache)
    assert corpus.hash == open_corpus("stdlib", cache=tmp_path / "other").hash
    found = split_documents(corpus)
    root = sysconfig.get_path("stdlib")
    assert Path(root, "argparse.py").read_bytes() in sum(found.values(), [])
    assert len(set(sum(found.values(), []))) == sum(map(len, found.values())) > 400
    # Enough for the default held-out slice, in documents that are many.
    assert min(corpus.valid.bytes, corpus.test.bytes) > 262_144
    assert min(corpus.valid.documents, corpus.test.documents) >= 10


def test_source_that_changes_while_it_is_read_is_refused(folder, cache, monkeypatch):
    read = prepare.documents

    def changing(source, left_out):
        (folder / "new.txt").write_text("appeared")
        return read(source, left_out)

    monkeypatch.setattr(prepare, "documents", changing)
    with pytest.raises(UserError, match="changed while it was being read"):
        open_corpus(folder, cache=cache)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no file or folder"),
        (lambda p: p.mkdir(), "holds no data"),
        (lambda p: p.touch(), "is empty"),
        (lambda p: p.write_bytes(b"ab"), "2 bytes, too few"),
        (lambda p: os.mkfifo(p), "neither a regular file nor a folder"),
        (lambda p: (p.mkdir(), (p / "only").touch()), "left out: 1 empty"),
    ],
)
def test_sources_without_data_are_refused_in_one_line(tmp_path, cache, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message) as error:
        open_corpus(tmp_path / "source", cache=cache)
    assert "\n" not in str(error.value)


def test_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set E88_CACHE"):
        open_corpus(folder, cache=tmp_path / "file" / "cache")


def test_cache_within_the_data_is_refused_unless_hidden(folder, documents):
    with pytest.raises(UserError, match="lies inside the data"):
        open_corpus(folder, cache=folder / "cache")
    assert not (folder / "cache").exists()
    corpus = open_corpus(folder, cache=folder / ".cache")
    assert sum(split.documents for split in corpus.splits) == len(documents)

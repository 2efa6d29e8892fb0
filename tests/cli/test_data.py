"""The command `e88 data`."""

import json
import sys
import tarfile

import pytest

from e88.cli import main
from e88.data.corpus import open_corpus


@pytest.fixture
def e88(monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.setenv("E88_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["e88", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return (exit.value.code, *capsys.readouterr())

    run.work = work
    return run


@pytest.fixture
def texts(e88):
    root = e88.work / "texts"
    root.mkdir()
    for i in range(20):
        (root / f"{i}.txt").write_text(f"A line of document {i} long enough to show.\n" * (3 + i))
    return root


def test_summary_in_words(e88, texts):
    code, out, err = e88("data", "texts")
    assert (code, err) == (0, "")
    corpus = open_corpus(texts)
    assert corpus.hash in out and "texts (folder, split by document)" in out
    assert "A line of document" in out
    for split in corpus.splits:
        (line,) = (line for line in out.splitlines() if line.startswith(split.name))
        assert line.split() == [split.name, f"{split.bytes:,}", f"{len(split):,}", f"{split.documents}", split.sha256]


def test_summary_as_json(e88, texts):
    code, out, _ = e88("data", texts, "--json")
    corpus, found = open_corpus(texts), json.loads(out)
    assert code == 0 and corpus.describe().items() <= found.items()
    assert sum(split["documents"] for split in found["splits"].values()) == 20
    assert found["splits"]["train"]["bytes"] == found["splits"]["train"]["tokens"] == len(corpus.train)


def test_default_is_the_standard_library(e88):
    code, out, _ = e88("data", "--json")
    assert code == 0 and json.loads(out)["source"] == "stdlib"


def test_out_writes_a_portable_folder(e88, texts):
    with tarfile.open(e88.work / "texts.tar.xz", "w:xz") as archive:
        archive.add(texts, "texts")
    code, out, _ = e88("data", "texts.tar.xz", "--out", "prepared", "--json")
    assert code == 0 and json.loads(out)["hash"] == open_corpus(e88.work / "prepared").hash
    code, out, _ = e88("data", "prepared")
    assert code == 0 and open_corpus(texts).hash in out
    assert e88("data", "texts.tar.xz", "--out", "prepared")[0] == 0


def test_tokenizer_is_described(e88, texts):
    from tokenizers import Tokenizer, models

    vocabulary = {chr(c): c for c in range(128)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(e88.work / "ascii.json"))
    code, out, _ = e88("data", "texts", "--tokenizer", "ascii.json")
    assert code == 0 and "exact byte counts" in out and "128 ids, 1 bytes a token" in out


def test_binary_sample_is_printable(e88):
    (e88.work / "x.bin").write_bytes(bytes(range(256)) * 40)
    code, out, _ = e88("data", "x.bin")
    assert code == 0 and all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no file or folder 'missing'"),
        (["empty"], "holds no data"),
        (["empty.txt"], "is empty"),
        (["broken.tar.xz"], "damaged"),
        (["texts", "--out", "foreign"], "not empty and not a prepared folder"),
        (["texts", "--out", "empty.txt"], "is a file"),
        (["texts", "--out", "no/where"], "does not exist"),
        (["texts", "--out", "texts/inside"], "lies inside the source"),
        (["texts", "--out", "/proc/out"], "cannot write"),
        (["texts", "--tokenizer", "empty.txt"], "not a tokenizer file"),
        (["texts", "--tokenizer", "missing.json"], "cannot read the tokenizer"),
        (["half"], "prepare the data again"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(e88, texts, arguments, message):
    (e88.work / "empty").mkdir()
    (e88.work / "empty.txt").touch()
    (e88.work / "broken.tar.xz").write_bytes(b"\xfd7zXZ\0 and then something else")
    (e88.work / "foreign").mkdir()
    (e88.work / "foreign/mine.txt").write_text("mine")
    (e88.work / "half").mkdir()
    (e88.work / "half/e88-data.json").write_text('{"format": 1')
    before = {path: path.read_bytes() if path.is_file() else None for path in e88.work.rglob("*")}
    code, out, err = e88("data", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("e88: error: ") and err.count("\n") == 1 and message in err
    assert {path: path.read_bytes() if path.is_file() else None for path in e88.work.rglob("*")} == before
    assert not list(e88.work.parent.glob("cache/data/*.tmp-*"))

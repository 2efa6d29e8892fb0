"""Archives and compressed files."""

import bz2
import gzip
import importlib
import io
import lzma
import os
import sys
import tarfile

import pytest

from e88.data.corpus import open_corpus
from e88.errors import UserError

COMPRESS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}
if sys.version_info >= (3, 14):
    COMPRESS[".zst"] = importlib.import_module("compression.zstd").compress


def tar(members):
    """members: name -> content, or TarInfo type for a member without any."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1 or content == b"":
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "/etc/passwd"
                archive.addfile(info)
    return file.getvalue()


def splits(corpus):
    return [split[:].tobytes() for split in corpus.splits]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_named_members_are_the_splits(tmp_path, cache, suffix):
    members = {"./c/README": b"about", "c/train.txt": b"one\x1etwo", "c/valid.txt": b"three", "c/test.txt": b"four"}
    path = tmp_path / f"corpus.tar{suffix}"
    path.write_bytes(COMPRESS[suffix](tar(members)))
    corpus = open_corpus(path, cache=cache)
    assert splits(corpus) == [b"one\x1etwo", b"three", b"four"]
    assert [split.documents for split in corpus.splits] == [2, 1, 1]
    assert corpus.meta.split == "as named in the source"


@pytest.mark.parametrize("name", ["docs.tar", "docs.txz", "docs.tgz"])
def test_archive_of_documents_equals_the_folder(tmp_path, folder, documents, cache, name):
    suffix = {"docs.tar": "", "docs.txz": ".xz", "docs.tgz": ".gz"}[name]
    shuffled = dict(sorted(documents.items(), key=lambda item: item[1]))
    (tmp_path / name).write_bytes(COMPRESS[suffix](tar(shuffled)))
    assert open_corpus(tmp_path / name, cache=cache).hash == open_corpus(folder, cache=cache).hash


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
def test_compressed_file_equals_the_file(tmp_path, cache, suffix):
    content = b"".join(b"line %d\n" % i for i in range(5000))
    (tmp_path / "text").write_bytes(content)
    (tmp_path / f"text{suffix}").write_bytes(COMPRESS[suffix](content))
    corpus = open_corpus(tmp_path / f"text{suffix}", cache=cache)
    assert corpus.hash == open_corpus(tmp_path / "text", cache=cache).hash
    assert b"".join(splits(corpus)) == content


def test_member_names_and_kinds_cannot_reach_outside(tmp_path, cache, documents):
    odd = {
        "../../evil.txt": b"climbing", f"{tmp_path}/absolute.txt": b"absolute", ".hidden/x": b"hidden", "empty": b"",
        "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
    }  # fmt: skip
    path = tmp_path / "in" / "odd.tar"
    path.parent.mkdir()
    path.write_bytes(tar(documents | odd))
    before = set(tmp_path.rglob("*"))
    corpus = open_corpus(path, cache=cache)
    made = {p.relative_to(cache) for p in set(tmp_path.rglob("*")) - before - {cache}}
    assert {p.name for p in made if len(p.parts) == 2} == {"e88-data.json", "train.bin", "valid.bin", "test.bin"}
    found = sum((part.split(b"\x1e") for part in splits(corpus)), [])
    assert sorted(found) == sorted([*documents.values(), b"climbing", b"absolute"])
    assert corpus.meta.left_out == {"not a regular file": 4, "empty": 1}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_archive_cut_short_is_refused_and_leaves_nothing(tmp_path, cache, documents, suffix, part):
    content = COMPRESS[suffix](tar(documents).rstrip(b"\0") + bytes(2048))
    path = tmp_path / f"docs.tar{suffix}"
    path.write_bytes(content[: int(part * (len(content) - 2048 * (suffix == "")))])
    with pytest.raises(UserError) as error:
        open_corpus(path, cache=cache)
    assert "docs.tar" in str(error.value) and "\n" not in str(error.value)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_damaged_header_in_mid_archive_is_not_taken_for_its_end(tmp_path, cache):
    content = bytearray(tar({f"{i}.txt": b"x%d" % i * 100 for i in range(5)}))
    content[1024 + 5] ^= 0xFF
    (tmp_path / "docs.tar").write_bytes(content)
    with pytest.raises(UserError, match="damaged header"):
        open_corpus(tmp_path / "docs.tar", cache=cache)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
def test_flipped_bytes_of_a_compressed_archive_are_noticed(tmp_path, cache, documents, suffix):
    content = COMPRESS[suffix](tar(documents))
    path = tmp_path / f"docs.tar{suffix}"
    path.write_bytes(content)
    whole = open_corpus(path, cache=cache).hash
    for at in range(2, len(content), len(content) // 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        os.utime(path, ns=(0, at))
        try:
            # A byte that carries no content, such as a time stamp, may change freely.
            assert open_corpus(path, cache=cache).hash == whole
        except UserError as error:
            assert "damaged" in str(error)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads zstd itself")
def test_zstd_says_what_it_needs(tmp_path, cache):
    (tmp_path / "docs.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match="needs Python 3.14; decompress it first"):
        open_corpus(tmp_path / "docs.tar.zst", cache=cache)


@pytest.mark.parametrize("name", ["text.xz", "text.gz", "text.bz2", "text.tar", "text.tar.xz", "text.tgz"])
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path, cache, name):
    (tmp_path / name).write_bytes(b"plain text " * 200)
    with pytest.raises(UserError, match="not what its name says"):
        open_corpus(tmp_path / name, cache=cache)

"""Sources: what the user named, as a stream of documents. Nothing is ever written under a name found in an archive."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import json
import lzma
import os
import platform
import stat
import sysconfig
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from e88.data.progress import Progress
from e88.data.store import BLOCK, FORMAT, META
from e88.errors import UserError

STDLIB = "stdlib"
# Folders of the standard library that hold tests, machine-specific files or other people's packages.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
COMPRESSED = (".xz", ".gz", ".bz2", ".zst")
SHORT_TAR = {".txz": ".xz", ".tgz": ".gz", ".tbz2": ".bz2", ".tzst": ".zst"}


class UnreadableFile(Exception):
    """A file of a folder could not be read; the document is left out."""


@dataclass(frozen=True)
class Source:
    """kind: stdlib, folder, archive, compressed, file or prepared. compression: suffix, or empty."""

    kind: str
    path: Path
    name: str
    compression: str = ""

    def fingerprint(self) -> str:
        """Hex digest of what decides the content: kind, path, and the size and time of every file."""
        if self.kind in ("stdlib", "folder"):
            files = [(name, s.st_size, s.st_mtime_ns) for name, _, s in walk(self, Counter())]
        else:
            s = self.path.stat()
            files = [("", s.st_size, s.st_mtime_ns)]
        text = json.dumps([FORMAT, self.kind, str(self.path), files], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def holds(self, path: Path) -> bool:
        """Whether files written at `path` would become documents of this folder."""
        path = path.expanduser().resolve()
        if self.kind != "folder" or not path.is_relative_to(self.path):
            return False
        return not any(part.startswith(".") for part in path.relative_to(self.path).parts)


def find_source(source: str | Path) -> Source:
    """What a name or path stands for. `stdlib` is the standard library of the running Python, any other string a path.

    Raises UserError where there is nothing, or nothing that can be read as data.
    """
    if source == STDLIB:
        path = Path(sysconfig.get_path("stdlib"))
        return Source(STDLIB, path, f"{STDLIB}-{platform.python_version()}")
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no file or folder '{source}'; give a path, or '{STDLIB}' for Python's standard library")
    path = path.resolve()
    if path.is_dir():
        return Source("prepared" if (path / META).exists() else "folder", path, path.name or "root")
    if not path.is_file():
        raise UserError(f"'{source}' is neither a regular file nor a folder")
    stem, suffix = path.stem, path.suffix.lower()
    if suffix == ".tar" or suffix in SHORT_TAR:
        return Source("archive", path, path.name, SHORT_TAR.get(suffix, ""))
    if suffix in COMPRESSED:
        return Source("archive" if stem.lower().endswith(".tar") else "compressed", path, path.name, suffix)
    return Source("file", path, path.name)


Blocks = Iterator[bytes]


def documents(source: Source, left_out: Counter[str]) -> Iterator[tuple[str, Blocks]]:
    """(name, blocks of bytes) of each document, to be read in turn; `left_out` counts what is skipped, by reason.

    Reading a document of a folder may raise UnreadableFile; a broken archive raises UserError.
    """
    if source.kind == "archive":
        return _members(source, left_out)
    if source.kind == "compressed":
        return _decompressed(source)
    return _files(source, left_out)


def walk(source: Source, left_out: Counter[str]) -> Iterator[tuple[str, Path, os.stat_result]]:
    """(relative name, path, stat) of each regular non-empty file, sorted by name; hidden ones are skipped."""
    seen: set[tuple[int, int]] = set()
    found = []

    def unreadable(error: OSError) -> None:
        left_out["unreadable"] += 1

    for folder, folders, files in os.walk(source.path, onerror=unreadable, followlinks=True):
        here = os.stat(folder)
        # A link that leads back up, or to a folder already read, ends here.
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and _wanted_folder(source, f))
        for file in files:
            if file.startswith(".") or not _wanted_file(source, file):
                continue
            path = Path(folder, file)
            try:
                info = path.stat()
            except OSError:
                left_out["unreadable"] += 1
                continue
            if not stat.S_ISREG(info.st_mode):
                left_out["not a regular file"] += 1
            elif info.st_size == 0:
                left_out["empty"] += 1
            else:
                found.append((path.relative_to(source.path).as_posix(), path, info))
    return iter(sorted(found, key=lambda item: item[0]))


def _wanted_folder(source: Source, name: str) -> bool:
    return source.kind != STDLIB or not (name in STDLIB_LEFT_OUT or name.startswith("config-"))


def _wanted_file(source: Source, name: str) -> bool:
    return source.kind != STDLIB or (name.endswith(".py") and not name.startswith("_sysconfigdata"))


def _files(source: Source, left_out: Counter[str]) -> Iterator[tuple[str, Blocks]]:
    files = list(walk(source, left_out))
    done = 0
    with Progress(f"reading {source.name}", sum(info.st_size for _, _, info in files)) as bar:
        for name, path, info in files:
            yield name, _file_blocks(path)
            done += info.st_size
            bar.update(done)


def _file_blocks(path: Path) -> Blocks:
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise UnreadableFile(str(path)) from error


def _members(source: Source, left_out: Counter[str]) -> Iterator[tuple[str, Blocks]]:
    with source.path.open("rb") as raw, Progress(f"reading {source.name}", source.path.stat().st_size) as bar:
        with _broken(source):
            stream = _LastRead(_decompress(source, raw))
            archive = tarfile.open(fileobj=stream, mode="r:")  # type: ignore[call-overload]
        while True:
            with _broken(source):
                member = archive.next()
            if member is None:
                break
            # The archive object keeps every header it has read; ours may have millions.
            archive.members = []
            parts = PurePosixPath(member.name).parts
            if member.isdir() or any(part.startswith(".") and part != ".." for part in parts):
                continue
            if not member.isfile():
                left_out["not a regular file"] += 1
                continue
            if member.size == 0:
                left_out["empty"] += 1
                continue
            file = archive.extractfile(member)
            assert file is not None
            yield "/".join(parts), _stream_blocks(source, file, lambda: bar.update(raw.tell()))
        with _broken(source):
            # tarfile takes a damaged header in mid-archive for its end.
            if not stream.last or stream.last.strip(b"\0"):
                raise tarfile.ReadError("damaged header, or no end mark: the archive may be cut short")
            while stream.read(BLOCK):
                pass


def _decompressed(source: Source) -> Iterator[tuple[str, Blocks]]:
    with source.path.open("rb") as raw, Progress(f"reading {source.name}", source.path.stat().st_size) as bar:
        stream = _decompress(source, raw)
        yield source.path.stem, _stream_blocks(source, stream, lambda: bar.update(raw.tell()))


def _stream_blocks(source: Source, stream: IO[bytes], progress: Callable[[], None]) -> Blocks:
    while True:
        with _broken(source):
            block = stream.read(BLOCK)
        if not block:
            return
        yield block
        progress()


def _decompress(source: Source, raw: IO[bytes]) -> Any:
    if source.compression == ".xz":
        return lzma.LZMAFile(raw)
    if source.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == ".bz2":
        return bz2.BZ2File(raw)
    if source.compression == ".zst":
        try:
            return importlib.import_module("compression.zstd").ZstdFile(raw)
        except ModuleNotFoundError as error:
            raise UserError(f"reading {source.name} needs Python 3.14; decompress it first with zstd -d") from error
    return raw


class _LastRead:
    """A file that remembers what its last read returned."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.last = b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.last = self._file.read(size)
        return self.last


@contextmanager
def _broken(source: Source) -> Iterator[None]:
    """Turn what a damaged archive raises into one line. Decompressors and tarfile raise many types for it, OSError
    without a number among them; a numbered one is the system's and passes."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{source.path} is damaged or not what its name says ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

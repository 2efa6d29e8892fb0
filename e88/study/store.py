"""The store of a study's records: one JSON line for each run, appended, never rewritten.

A run that is repeated appends again, and the last line of an id wins. Several processes may append to one store. A line
torn by a kill is skipped when reading and closed by the next append, so it costs that one record and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e88.errors import UserError

SCHEMA = 1
FILE_NAME = "records.jsonl"
# What `e88 train` leaves in the folder of its run.
RUN_RECORD = "record.json"
CURVES = ("curve", "heldout_curve")

Record = dict[str, Any]

_CURVE_OPENINGS = [re.compile(rb'"%s":\s*\[' % key.encode()) for key in CURVES]

_log = logging.getLogger(__name__)


class Store:
    """The records in `folder`/records.jsonl. A folder that does not exist yet is an empty store; append creates it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME

    def append(self, record: Record) -> None:
        """Add one record durably: when this returns, it is on the disk. Numbers that are not finite become null.

        Raises UserError where the folder cannot be made or written.
        """
        assert isinstance(record.get("id"), str) and record["id"], "a record needs an id"
        line = json.dumps(finite(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as file:
                size = os.fstat(file).st_size
                torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                _write(file, b"\n" + line if torn else line)
                os.fsync(file)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); choose a folder you can write to") from error

    def records(self) -> list[Record]:
        """The latest record of every id, in the order in which the ids first appeared."""
        return list(_latest(_read(self.path)).values()) if self.path.exists() else []

    def summaries(self) -> list[Record]:
        """As `records`, with every curve left empty: what a listing of many runs needs, at a tenth of the time."""
        return list(_latest(_read(self.path, curves=False)).values()) if self.path.exists() else []

    def curves(self, ids: Collection[str]) -> dict[str, Record]:
        """The latest records of some ids with their curves, by id; the curves of others are never parsed."""
        return _latest(_read(self.path, ids)) if ids and self.path.exists() else {}

    def get(self, run_id: str) -> Record | None:
        """The latest record of an id, or None."""
        return next((record for record in self.records() if record["id"] == run_id), None)


def load_records(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], curves: bool | Collection[str] = True
) -> list[Record]:
    """The records of one or several stores, each given as its folder or as its JSON-lines file, or of the folder of one
    run.

    curves: whether with their curves, or the ids of the only records to read, with theirs.

    A run found more than once counts once, the later path winning; the same id on other hardware is another measurement
    and stays. Raises UserError where a path does not exist or holds no store.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: dict[tuple[str, str], Record] = {}
    for given in map(Path, paths):
        path = given / FILE_NAME if given.is_dir() else given
        if not path.exists() and (given / RUN_RECORD).exists():
            path = given / RUN_RECORD
        if not path.exists():
            what = f"{given} holds no {FILE_NAME}" if given.is_dir() else f"{given} does not exist"
            raise UserError(f"{what}; give the output folder of a run or a study")
        records = _latest(_read(path, curves) if path.name != RUN_RECORD else _read_one(path, curves))
        if not records and isinstance(curves, bool):
            raise UserError(f"{path} holds no readable record; give the output folder of a run or a study")
        for record in records.values():
            hardware = (record.get("environment") or {}).get("hardware")
            found[record["id"], str(hardware)] = record
    return list(found.values())


def _latest(records: Iterable[Record]) -> dict[str, Record]:
    return {record["id"]: record for record in records}


def _read(path: Path, curves: bool | Collection[str] = True) -> list[Record]:
    """The records of a file, in order; curves: whether with their curves, or of which ids alone, with them."""
    records, torn = [], 0
    try:
        with _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as file, os.fdopen(os.dup(file), "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line) if curves is True else _without_curves(line)
                    if curves and curves is not True:
                        if record["id"] not in curves:
                            continue
                        record = json.loads(line)
                except ValueError:
                    torn += 1
                    continue
                _check(record, path, number)
                records.append(record)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    if torn:
        _log.warning("%s: skipped %d torn line%s", path, torn, "" if torn == 1 else "s")
    return records


def _read_one(path: Path, curves: bool | Collection[str]) -> list[Record]:
    """The record of a run's folder, as `_read` gives it."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except ValueError:
        return []
    _check(record, path, 1)
    return [record] if isinstance(curves, bool) or record["id"] in curves else []


def _check(record: Any, path: Path, number: int) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise UserError(f"{path} line {number} is not a record of a run; is this a file of {FILE_NAME}'s form?")
    if record.get("schema", SCHEMA) != SCHEMA:
        raise UserError(f"{path} line {number} has schema {record['schema']}, not {SCHEMA}; use a matching e88")


def _without_curves(line: bytes) -> Any:
    """The record of a line with its curves emptied before it is parsed, which is most of a line.

    A curve is a flat list of flat objects, so its first closing bracket ends it. Where a line is of another form the
    cut leaves no valid JSON, and the whole line is parsed instead.
    """
    cut = line
    for opening in _CURVE_OPENINGS:
        if found := opening.search(cut):
            cut = cut[: found.end()] + cut[cut.find(b"]", found.end()) :]
    try:
        record = json.loads(cut)
    except ValueError:
        record = json.loads(line)
    if isinstance(record, dict):
        record |= {key: [] for key in CURVES if key in record}
    return record


@contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, lock)
        yield file
    finally:
        os.close(file)


def _write(file: int, data: bytes) -> None:
    # One call writes it all but on a full disk; then the rest is tried again, and the error of that is raised.
    while data:
        data = data[os.write(file, data) :]


def finite(value: Any) -> Any:
    """The same value with null for every number that is not finite, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value

"""The store under concurrent writers, kills in mid-line and wrong paths."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e88.errors import UserError
from e88.study.store import FILE_NAME, Store, load_records


def record(run_id: str, **fields: Any) -> dict[str, Any]:
    return {"schema": 1, "id": run_id, "status": "done", **fields}


def append_many(folder: str, writer: int, count: int) -> None:
    store = Store(folder)
    for index in range(count):
        store.append(record(f"{writer}-{index}", filler="x" * 20_000))


def test_round_trip_and_last_line_wins(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    assert store.records() == [] and store.get("a") is None
    store.append(record("a", value=1))
    store.append(record("b", status="failed"))
    store.append(record("c", status="diverged"))
    store.append(record("a", value=2))
    assert [r["id"] for r in store.records()] == ["a", "b", "c"]
    assert store.get("a") == record("a", value=2)
    store.append(record("b"))
    assert [r["status"] for r in store.records()] == ["done", "done", "diverged"]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    Store(tmp_path).append(record("a", loss=float("nan"), curve=[{"loss": float("inf")}], pair=(1.0, float("-inf"))))
    text = (tmp_path / FILE_NAME).read_text()
    assert "NaN" not in text and "Infinity" not in text
    read = json.loads(text)
    assert read["loss"] is None and read["curve"] == [{"loss": None}] and read["pair"] == [1.0, None]


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(str(tmp_path), writer, 25)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert all(process.exitcode == 0 for process in writers)
    lines = (tmp_path / FILE_NAME).read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == 100
    assert {json.loads(line)["id"] for line in lines} == {f"{w}-{i}" for w in range(4) for i in range(25)}


@pytest.mark.parametrize("cut", [1, 10, -2])
def test_a_torn_last_line_costs_that_record_alone(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.append(record("a"))
    whole = store.path.read_bytes()
    store.append(record("b"))
    line = store.path.read_bytes()[len(whole) :]
    store.path.write_bytes(whole + line[:cut])
    with caplog.at_level(logging.WARNING):
        assert [r["id"] for r in store.records()] == ["a"]
    assert len(caplog.records) == 1 and "1 torn line" in caplog.text and "\n" not in caplog.records[0].getMessage()
    store.append(record("c"))
    assert [r["id"] for r in store.records()] == ["a", "c"]
    assert store.path.read_bytes().startswith(whole + line[:cut] + b"\n")


def test_a_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(record("a"))
    store.path.write_bytes(store.path.read_bytes().rstrip(b"\n"))
    store.append(record("b"))
    assert [r["id"] for r in store.records()] == ["a", "b"]


def test_a_store_of_one_torn_line_can_go_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.path.write_bytes(b'{"schema":1,"id":"a"')
    assert store.records() == []
    store.append(record("a"))
    assert store.records() == [record("a")]


def test_load_records_joins_stores(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "1"), Store(tmp_path / "2")
    first.append(record("a", value=1, environment={"hardware": "cpu"}))
    first.append(record("b", environment={"hardware": "cpu"}))
    second.append(record("a", value=2, environment={"hardware": "cpu"}))
    second.append(record("b", environment={"hardware": "gpu"}))
    found = load_records([first.folder, second.path])
    assert [(r["id"], r["environment"]["hardware"], r.get("value")) for r in found] == [
        ("a", "cpu", 2), ("b", "cpu", None), ("b", "gpu", None),
    ]  # fmt: skip
    assert load_records(first.folder) == load_records([str(first.path)])


def test_the_folder_of_one_run_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(record("a"), indent=1))
    assert load_records(tmp_path) == load_records(tmp_path, curves=["a"]) == [record("a")]
    assert load_records(tmp_path, curves=["b"]) == []
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match="no readable record"):
        load_records(tmp_path)


def test_wrong_paths_are_user_errors(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, f"holds no {FILE_NAME}")):
        with pytest.raises(UserError, match=message):
            load_records([path])
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        Store(tmp_path / "plain" / "inside").append(record("a"))
    with pytest.raises(UserError, match="no readable record"):
        load_records(tmp_path / "plain")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        Store(tmp_path).append(record("a"))


def test_foreign_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    for line, message in (('{"no": "id"}', "line 1 is not a record"), ('{"id":"a","schema":2}', "schema 2")):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            Store(tmp_path).records()


def test_reading_needs_no_torch() -> None:
    code = "import sys, e88.study.store; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_records_load_in_order(tmp_path: Path) -> None:
    lines = (json.dumps(record(str(i % 7000), value=i)) + "\n" for i in range(10_000))
    (tmp_path / FILE_NAME).write_text("".join(lines))
    found = load_records(tmp_path)
    assert [r["id"] for r in found] == [str(i) for i in range(7000)]
    assert [r["value"] for r in found] == [i + 7000 if i < 3000 else i for i in range(7000)]

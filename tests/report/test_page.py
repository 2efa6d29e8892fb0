"""The page: whole, self-contained, escaped, and able to show whatever a study may hold."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markup import Page, check

from e88.errors import UserError
from e88.report.page import render, write_page
from e88.report.plots import write_figure
from e88.report.tables import render_markdown, render_terminal, summary_rows
from e88.study.store import Store


def test_page_shows_every_run(study: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_page(study, tmp_path / "deep" / "report.html", title="A study")
    markup = path.read_text(encoding="utf-8")
    page = check(markup)
    assert markup.startswith("<!doctype html>") and "http" not in markup.replace('<meta http-equiv="Content', "")
    for run in study:
        assert run["id"] in page.text
    assert page.text.count("A study") == 2
    assert "out of memory: 1.2 GiB" in page.text and "the loss was not finite" in page.text
    assert "0f92853aa01b" in page.text and "2.13.0" in page.text and "AMD EPYC 7763" in page.text
    titles = re.findall(r"<h4>(.*?)</h4>", markup)
    assert len(titles) == 9 and len(set(titles)) == 9
    assert list(tmp_path.glob("deep/*")) == [path]


def test_axes_have_units(study: list[dict[str, Any]], tmp_path: Path) -> None:
    text = Page(write_page(study, tmp_path / "x.html").read_text(encoding="utf-8")).text
    titles = ("training time, seconds", "training tokens", "training compute, FLOPs", "training loss, nats per token")
    titles += ("held-out bits per byte", "state per layer, elements", "training tokens per second")
    for title in titles:
        assert title in text


def test_hostile_text_stays_text(make_record: Any, tmp_path: Path) -> None:
    evil = "</script></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7*7 }} {% raw %}"
    records = [make_record(evil), make_record("tiny-gdn"), make_record("b" + evil, 0, "failed")]
    records[0]["environment"]["commit"] = evil
    records[0]["environment"]["hardware"] = records[1]["environment"]["hardware"] = evil
    records[2]["reason"] = evil
    records[0]["data"]["name"] = evil
    records[1]["config"]["data"] = {evil: evil}
    page = check(write_page(records, tmp_path / "x.html", title=evil).read_text(encoding="utf-8"))
    assert page.text.count(evil) >= 8
    ElementTree.parse(write_figure(records, tmp_path / "x.svg"))


def test_fifty_models_with_long_names(make_record: Any, tmp_path: Path) -> None:
    records = [make_record(f"{'long-' * 20}{i}", 0, floor=1.3 + 0.01 * i, state=1000 * (i + 1)) for i in range(50)]
    page = check(write_page(records, tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "best 14 named, 26 more thin" in page.text and "The best 40 of 50 models" in page.text
    assert all(run["id"] in page.text for run in records)


def test_labels_of_lines_do_not_overlap(make_record: Any, tmp_path: Path) -> None:
    records = [make_record(f"model-{i}", 0, floor=1.3 + 1e-4 * i, noise=0.0) for i in range(14)]
    tree = ElementTree.parse(write_figure(records, tmp_path / "x.svg"))
    texts = tree.iter("{http://www.w3.org/2000/svg}text")
    heights = sorted(float(text.get("y", "")) for text in texts if (text.text or "").startswith("model-"))
    assert len(heights) == 14
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 15.9


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_only_lost_runs(make_record: Any, tmp_path: Path, status: str) -> None:
    records = [make_record("tiny-e88", seed, status) for seed in range(2)]
    page = check(write_page(records, tmp_path / "x.html").read_text(encoding="utf-8"))
    assert f"no model has a held-out figure (runs: 2 {status})" in page.text


def test_curves_of_one_point_or_none(make_record: Any, tmp_path: Path) -> None:
    single, empty, nothing = make_record("a"), make_record("b"), make_record("c")
    single["curve"], single["heldout_curve"] = single["curve"][-1:], single["heldout_curve"][-1:]
    empty["curve"], empty["heldout_curve"] = [], []
    del empty["model"]["flops_per_token"]
    nothing["model"]["flops_per_token"] = -1.0
    nothing["curve"] = [{"step": 1, "tokens": 10, "seconds": 1.0, "loss": None, "lr": 1e-3}]
    check(write_page([single, empty, nothing], tmp_path / "x.html").read_text(encoding="utf-8"))
    check(write_page([single], tmp_path / "y.html").read_text(encoding="utf-8"))
    unknown = make_record("d", 0)
    del unknown["model"]["flops_per_token"]
    page = check(write_page([unknown], tmp_path / "y.html").read_text(encoding="utf-8"))
    assert "against tokens" in page.text and "against compute" not in page.text
    with pytest.raises(UserError, match="no run has a curve"):
        write_figure([{**empty}], tmp_path / "x.svg")


def test_e88_keeps_its_colour_whatever_else_ran(make_record: Any, study: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = write_page([make_record()], tmp_path / "x.html").read_text(encoding="utf-8")
    among = write_page(study, tmp_path / "y.html").read_text(encoding="utf-8")
    accent = "--l:#c8500a;--d:#ff8a45"
    assert accent in alone and accent in among
    assert among.count("--l:#0067a5") and "--l:#0067a5" not in alone


def test_the_state_of_attention_is_explained_where_there_is_any(make_record: Any, tmp_path: Path) -> None:
    remark = "The state of attention is its cache of one window"
    pair = [make_record("tiny-e88"), make_record("tiny-gdn")]
    path = tmp_path / "x.html"
    assert remark not in write_page(pair, path).read_text(encoding="utf-8")
    pair[0]["config"]["model"].update(hybrid={"kind": "attention", "n_heads": 2}, hybrid_every=2)
    assert remark in write_page(pair, path).read_text(encoding="utf-8")


def test_figure_stands_alone_and_follows_the_theme(study: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_figure(study, tmp_path / "figure.svg")
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "860"
    assert "prefers-color-scheme" in text and text.count("http") == 1 and "url(" not in text
    assert "Held-out bits per byte against training time" in text and "mean and range of 1 to 3 seeds" in text
    alike = [run for run in study if run["status"] == "done"]
    assert "mean and range of 3 seeds" in write_figure(alike, path).read_text(encoding="utf-8")
    for run in study:
        run["heldout_curve"] = run.get("heldout_curve", [])[-1:]
    assert "Training loss, bits per byte against training time" in write_figure(study, path).read_text(encoding="utf-8")


def test_render_writes_the_page_and_both_tables(study: list[dict[str, Any]], tmp_path: Path) -> None:
    for index, run in enumerate(study):
        Store(tmp_path / f"store{index % 2}").append(run)
    page, rows = render([tmp_path / "store0", tmp_path / "store1"], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "table.csv", "table.md"]
    markup = page.read_text(encoding="utf-8")
    assert all(run["id"] in markup for run in study)
    # The same page as from whole records, in another order.
    assert markup.count('class="line"') == write_page(study, tmp_path / "x.html").read_text().count('class="line"') > 9
    assert {run for row in rows for run in row.ids} == {run["id"] for run in study}
    assert render(tmp_path / "store0", tmp_path / "named.html")[0] == tmp_path / "named.html"
    umask = os.umask(0)
    os.umask(umask)
    assert page.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_page(study: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        write_page([], tmp_path / "x.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_page(study, tmp_path / "file" / "x.html")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_page(study, tmp_path / "x.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.html"]


def test_without_jinja2_the_error_names_the_remedy(
    study: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"install e88\[report\]"):
        write_page(study, tmp_path / "x.html")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, e88.report.page; sys.exit(bool({'torch', 'numba', 'jinja2', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path, *(inner for key, item in value.items() for inner in _paths(item, (*path, key)))]
    return [path]


# No shrinking: an example is read as it is, and each takes a page to try.
@settings(
    max_examples=40,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_is_missing_or_odd_the_page_is_written(data: Any, make_record: Any, tmp_path: Path) -> None:
    records = [make_record("tiny-e88", 0), make_record("tiny-e88", 1), make_record("tiny-gdn", 0, "diverged")]
    records.append(make_record("tiny-mamba2", 0))
    for record in records:
        kept = {(), ("id",), ("status",), ("seed",)}
        paths = [path for path in _paths(record) if path not in kept]
        for path in data.draw(st.lists(st.sampled_from(paths), max_size=6, unique=True)):
            holder: Any = record
            for key in path[:-1]:
                holder = (holder or {}).get(key)
            if not isinstance(holder, dict) or path[-1] not in holder:
                continue
            was = holder[path[-1]]
            if isinstance(was, (int, float)) and data.draw(st.booleans()):
                holder[path[-1]] = data.draw(st.sampled_from([0, float("nan"), float("inf"), -1.0, 1e30, 1e-30]))
            elif data.draw(st.booleans()):
                holder[path[-1]] = None
            else:
                del holder[path[-1]]
    page = check(write_page(records, tmp_path / "x.html").read_text(encoding="utf-8"))
    assert all(record["id"] in page.text for record in records)
    render_terminal(summary_rows(records), width=100)
    render_markdown(summary_rows(records))

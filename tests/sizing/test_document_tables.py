"""The documents' tables: every printed figure is reproduced, or explained."""

from __future__ import annotations

import pytest

from e88.errors import UserError
from e88.sizing.documents import DOCUMENTS
from e88.sizing.tables import document_table, document_tables, printed_value

FIGURES = ("params", "ratio", "state")


@pytest.mark.parametrize(
    ("text", "value", "half_place"),
    [
        ("504M", 504e6, 0.5e6),
        ("57,344", 57_344, 0.5),
        ("1.01B", 1.01e9, 5e6),
        ("~530M", 530e6, 5e6),
        ("~500M", 500e6, 50e6),
        ("~1B", 1e9, 0.5e9),
        ("0.82", 0.82, 0.005),
        ("27.0", 27.0, 0.05),
    ],
)
def test_printed_value(text: str, value: float, half_place: float) -> None:
    assert printed_value(text) == (pytest.approx(value), pytest.approx(half_place))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_figure_is_reproduced_or_explained(name: str) -> None:
    for row in document_table(name)["rows"]:
        off = [figure for figure in FIGURES if row[figure]["agrees"] is False]
        if row["params"].get("formula_agrees"):
            off = [figure for figure in off if figure != "params"]
        planned_depths = name == "plan" and row["section"] == "depth sweep (planned)"
        assert not off or row["note"] or planned_depths, (row["label"], off)


@pytest.mark.parametrize(
    ("name", "reproduced"),
    [
        # (params, ratio, state) figures that agree at the printed precision, of all that are printed.
        ("benchmark", ((8, 9), (7, 7), (8, 9))),
        ("sizing", ((0, 12), (10, 10), (8, 14))),
        ("balanced", ((3, 6), (10, 10), (9, 11))),
        ("state", ((2, 2), (0, 0), (9, 10))),
    ],
)
def test_how_many_figures_agree(name: str, reproduced: tuple[tuple[int, int], ...]) -> None:
    rows = document_table(name)["rows"]
    counts = []
    for figure in FIGURES:
        agree = [row[figure]["agrees"] for row in rows if row[figure]["printed"]]
        counts.append((sum(agree), len(agree)))
    assert tuple(counts) == reproduced


def test_sizing_guide_follows_its_own_formula_only_at_500m() -> None:
    rows = document_table("sizing")["rows"]
    agree = {row["label"] for row in rows if row["params"]["formula_agrees"]}
    assert agree == {"h64n32", "h68n32", "h72n32", "h76n32", "h48n48", "h40n64"}


def test_figures_beside_the_documents() -> None:
    rows = {row["label"]: row for row in document_table("balanced")["rows"] if row["section"] == "recommended"}
    params = rows["E88_b64n32"]["params"]
    assert params["printed"] == "~530M" and params["formula"] == 4 * 2048 * 2048 * 32
    assert params["difference"] == pytest.approx(541_661_184 / 530e6 - 1)


def test_names() -> None:
    assert [table["name"] for table in document_tables()] == list(DOCUMENTS)
    assert [table["name"] for table in document_tables("sizing")] == ["sizing"]
    with pytest.raises(UserError, match="did you mean sizing"):
        document_tables("sizng")

"""The documents' tables again, each figure beside the exact one."""

from __future__ import annotations

import re
from typing import Any

from e88.errors import unknown_name
from e88.models.config import E88Config, ModelConfig
from e88.sizing.closed_form import count_params, dim_over_inner, projection_ratio, state_per_layer
from e88.sizing.documents import DOCUMENTS, Document, Row
from e88.sizing.presets import preset

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


def printed_value(text: str) -> tuple[float, float]:
    """A printed figure as (value, half of its last place): "504M" -> (504e6, 0.5e6), "~530M" -> (530e6, 5e6).

    A figure marked "~" is read as rounded to its last digit that is not zero.
    """
    match = re.fullmatch(r"(~?)([\d,]+)(?:\.(\d+))?([KMB]?)", text)
    assert match is not None, text
    whole, decimals, unit = match[2].replace(",", ""), match[3] or "", UNITS[match[4]]
    place = 10.0 ** -len(decimals)
    if match[1]:
        digits = whole + decimals
        place *= 10.0 ** (len(digits) - len(digits.rstrip("0")))
    return float(f"{whole}.{decimals or 0}") * unit, place * unit / 2


def formula_params(formula: str, config: ModelConfig) -> int | None:
    """What a guide's own parameter formula gives for an E88 shape; None where the document has no formula."""
    if not formula or not isinstance(config.mixer, E88Config):
        return None
    dim, depth, inner = config.dim, config.depth, config.mixer.d_inner
    if formula == "balanced":
        return 4 * dim * inner * depth
    assert formula == "sizing"
    return config.vocab_size * dim + depth * (5 * dim * inner + 2 * dim) + 2 * dim


def document_table(name: str) -> dict[str, Any]:
    """One document's tables: source, title, ratio (which one), rows, notes.

    A row holds section, label, preset, its config, note, and for params, ratio and state each a mapping with
    printed (text or None), exact, difference (exact/printed - 1, or None) and agrees (to the printed precision, or
    None); params also what the guide's own formula gives and whether that agrees.
    """
    if name not in DOCUMENTS:
        raise unknown_name("table", name, [*DOCUMENTS, "all"])
    document = DOCUMENTS[name]
    return {
        "name": name,
        "source": document.source,
        "title": document.title,
        "ratio": document.ratio,
        "rows": [_row(document, row) for row in document.rows],
        "notes": list(document.notes),
    }


def document_tables(name: str = "all") -> list[dict[str, Any]]:
    """`document_table` of one document, or of every one for "all"."""
    return [document_table(one) for one in (DOCUMENTS if name == "all" else (name,))]


def _row(document: Document, row: Row) -> dict[str, Any]:
    config = preset(row.preset)
    ratio = projection_ratio(config) if document.ratio == "H*n/dim" else dim_over_inner(config)
    params = _figure(row.params, count_params(config))
    formula = formula_params(document.formula, config)
    params["formula"] = formula
    params["formula_agrees"] = _figure(row.params, formula)["agrees"]
    return {
        "section": row.section,
        "label": row.label,
        "preset": row.preset,
        "config": config.to_dict(),
        "params": params,
        "ratio": _figure(row.ratio, ratio),
        "state": _figure(row.state, state_per_layer(config)),
        "note": row.note,
    }


def _figure(printed: str, exact: float | None) -> dict[str, Any]:
    if not printed or exact is None:
        return {"printed": printed or None, "exact": exact, "difference": None, "agrees": None}
    value, half_place = printed_value(printed)
    # A figure exactly between two roundings may have gone either way.
    agrees = abs(exact - value) <= half_place * (1 + 1e-9)
    return {"printed": printed, "exact": exact, "difference": exact / value - 1, "agrees": agrees}

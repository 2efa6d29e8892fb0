"""Numbers of parameters, and of bytes, as people write them."""

from __future__ import annotations

import re

from e88.errors import UserError


def parse_count(text: str) -> int:
    """A number of parameters written `100M`, `1.5B`, `530k` or `1500000`. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([kmbg]?)\s*", text, re.IGNORECASE)
    unit = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
    value = float(re.sub("[_,]", "", match[1])) * unit[match[2].lower()] if match else 0.0
    if value < 1:
        raise UserError(f"'{text}' is not a number of parameters; write it like 100M, 1.5B or 530k")
    return round(value)


def human_count(value: float) -> str:
    """541692032 -> '541.7M'; below a thousand the plain number."""
    for size, unit, digits in ((1, "", 0), (1e3, "k", 1), (1e6, "M", 1)):
        text = f"{value / size:.{digits}f}"
        if float(text) < 1000:
            return text + unit
    return f"{value / 1e9:.2f}B"


def human_bytes(size: float) -> str:
    """28900000000 -> '28.9 GB'."""
    for unit in ("B", "kB", "MB"):
        text = f"{size:.3g}"
        if float(text) < 1000:
            return f"{text} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"

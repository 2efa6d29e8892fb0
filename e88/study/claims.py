"""Claims: named statements about a study's models, each with the comparison that decides it.

A claim has exactly one form:

    lower = [a, b]      the metric of a is below that of b; with `by`, by more than that; with `factor`, b/a is above it
    higher = [a, b]     the metric of a is above that of b; with `by`, by more than that; with `factor`, a/b is above it
    close = [a, b]      the two differ by less than `by`
    best = [a, ...]     one of these beats every other of `of`
    order = [a, b, ...] each is better than the next
    trains = [a, ...]   each trains to the end of its budget and predicts better than a uniform guess
    diverges = [a, ...] none does
    equals = [a]        the metric is `value`, within the share `within`
    all = [claim, ...]  these claims hold together

Metrics of size (`params`, `state_per_layer`, ...) are exact: such a claim is about the full-size models and needs no
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from e88.errors import UserError, unknown_name

FORMS = ("lower", "higher", "close", "best", "order", "trains", "diverges", "equals", "all")
OPTIONS = ("says", "source", "metric", "budget", "by", "factor", "of", "value", "within", "hardware", "scales", "note")
SIZES = ("params", "state_per_layer", "state_total", "projection_ratio", "dim_over_inner", "flops_per_token")
SPEEDS = ("tokens_per_second", "mfu")
# Metric -> whether less of it is better.
LESS_IS_BETTER = {
    "heldout_bpb": True,
    "train_loss": True,
    "peak_memory_bytes": True,
    **dict.fromkeys(SPEEDS, False),
    **dict.fromkeys(SIZES, True),
}
PAIRS = ("lower", "higher", "close")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement. says: in words. source: where it was made. models: what the form names, or claims for `all`.

    metric: see `LESS_IS_BETTER`. budget: which of the study's. of: the whole field of `best`. hardware: what the
    hardware's name must contain. scales: where it is tested, everywhere if empty. note: what else to know when
    reading the verdict.
    """

    name: str
    says: str
    source: str
    form: str
    models: tuple[str, ...]
    metric: str = "heldout_bpb"
    budget: str = ""
    by: float = 0.0
    factor: float | None = None
    of: tuple[str, ...] = ()
    value: float | None = None
    within: float = 0.01
    hardware: str = ""
    scales: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_exact(self) -> bool:
        """Decided by arithmetic on the full-size models."""
        return self.form != "all" and self.metric in SIZES

    @property
    def is_ratio(self) -> bool:
        """Decided by the ratio of two models' metrics, as speed always is."""
        return self.factor is not None or self.metric in SPEEDS

    @property
    def involved(self) -> tuple[str, ...]:
        """Every model whose runs the claim needs."""
        if self.form == "all" or self.is_exact:
            return ()
        return tuple(dict.fromkeys((*self.models, *self.of)))


def parse_claim(name: str, table: Mapping[str, Any], models: Sequence[str], budgets: Mapping[str, set[str]]) -> Claim:
    """The claim of a table in a spec. budgets: name -> the scales at which its runs share a processor.

    UserError for whatever is wrong with it.
    """
    try:
        return _parse(name, dict(table), models, budgets)
    except UserError as error:
        raise UserError(f"claim '{name}': {error}") from error


def _parse(name: str, table: dict[str, Any], models: Sequence[str], budgets: Mapping[str, set[str]]) -> Claim:
    for key in table:
        if key not in FORMS + OPTIONS:
            raise unknown_name("key", key, FORMS + OPTIONS)
    forms = [form for form in FORMS if form in table]
    if len(forms) != 1:
        raise UserError(f"give exactly one of {', '.join(FORMS)}; it has {', '.join(forms) or 'none'}")
    form = forms[0]
    named = _names(table.pop(form), form)
    members = named if form == "all" else expand(named, models)
    of = expand(_names(table.pop("of"), "of"), models) if "of" in table else ()
    values: dict[str, Any] = {"budget": next(iter(budgets), ""), **table}
    values["scales"] = _names(table["scales"], "scales") if "scales" in table else ()
    for key in ("says", "source"):
        if not isinstance(values.get(key), str):
            raise UserError(f"it needs the text '{key}'")
    for key in ("by", "factor", "value", "within"):
        number = values.get(key)
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise UserError(f"{key} must be a number, got {number!r}")
    claim = Claim(name=name, form=form, models=members, of=of, **values)
    _check(claim, budgets)
    return claim


def _check(claim: Claim, budgets: Mapping[str, set[str]]) -> None:
    if claim.metric not in LESS_IS_BETTER:
        raise unknown_name("metric", claim.metric, LESS_IS_BETTER)
    if claim.form != "all" and not claim.is_exact:
        if claim.budget not in budgets:
            raise unknown_name("budget", claim.budget, budgets)
        shared = {s for s in budgets[claim.budget] if not claim.scales or s in claim.scales}
        if claim.metric in SPEEDS and shared:
            raise UserError(f"{claim.metric} needs an exclusive budget; '{claim.budget}' is not at {min(shared)}")
    wrong = {
        "two models": claim.form in PAIRS and len(claim.models) != 2,
        "one model": claim.form == "equals" and len(claim.models) != 1,
        "two models or more": claim.form == "order" and len(claim.models) < 2,
        "a positive 'by'": claim.form == "close" and claim.by <= 0,
        "'of' with more models than the best": claim.form == "best" and not set(claim.of) > set(claim.models),
        "a 'value'": claim.form == "equals" and claim.value is None,
        "a metric of size, which is exact": claim.form == "equals" and not claim.is_exact,
        "runs, and a metric of size has none": claim.form in ("trains", "diverges") and claim.is_exact,
        "neither 'by' nor 'factor'": claim.form not in PAIRS and (bool(claim.by) or claim.factor is not None),
        "a 'factor' and no 'by' where it is about a ratio": bool(claim.by) and claim.is_ratio,
    }
    for need, is_missing in wrong.items():
        if is_missing:
            raise UserError(f"'{claim.form}' needs {need}")


def _names(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key} must be a list of names, got {value!r}")
    return tuple(value)


def expand(patterns: Sequence[str], names: Sequence[str], kind: str = "model") -> tuple[str, ...]:
    """Names in which `*` and `?` stand for all that match, in the order of `names`; UserError where none does."""
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise unknown_name(kind, pattern, names)
        found |= dict.fromkeys(matching)
    return tuple(found)

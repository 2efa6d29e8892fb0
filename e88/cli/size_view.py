"""How `e88 size` and `e88 presets` look: tables at their natural width, or the terminal's where there is one."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from e88.sizing.units import human_bytes, human_count

Row = dict[str, Any]
SWEEP = "In the scaling study's sweep 32 was best in equal time; per step, larger states were slightly better."
# Columns, more than any table needs.
UNBOUNDED = 1000
NAMES = {"e88": "E88", "gated_deltanet": "Gated DeltaNet", "mamba2": "Mamba2", "attention": "Transformer"}


def _print(*parts: Any) -> None:
    """Print to standard output; without a terminal no line is wrapped, cut or padded."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    text = io.StringIO()
    Console(highlight=False, width=UNBOUNDED, file=text).print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _table(title: str, *columns: str) -> Table:
    """Columns marked ">" are right-aligned, those marked "~" may be folded; without names there is no header."""
    named = any(column.lstrip(">~") for column in columns)
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD if named else None,
        pad_edge=False, show_header=named, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">~"), justify=justify, no_wrap=not column.startswith("~"), overflow="fold")
    return table


def shape(config: Row) -> str:
    """One line about a configuration's shape."""
    parts = [f"dim {config['dim']}", f"depth {config['depth']}", _heads(config["mixer"], config["dim"])]
    if "hybrid" in config:
        parts.append(f"one block in {config['hybrid_every']} with {_heads(config['hybrid'], config['dim'])}")
    if config["mlp_hidden"]:
        parts.append(f"MLP {config['mlp_hidden']}")
    return ", ".join(parts)


def _heads(mixer: Row, dim: int) -> str:
    kind = mixer["kind"]
    if kind == "e88":
        wide = f", expand_v {mixer['expand_v']:g}" if mixer["expand_v"] != 1 else ""
        return f"{mixer['n_heads']} heads of {mixer['n_state']}{wide}"
    if kind == "gated_deltanet":
        return f"{mixer['n_heads']} heads of {mixer['head_dim']}, expand_v {mixer['expand_v']:g}"
    if kind == "mamba2":
        return f"{mixer['expand'] * dim // mixer['head_dim']} heads of {mixer['head_dim']}, d_state {mixer['d_state']}"
    return f"{mixer['n_heads']} heads of {dim // mixer['n_heads']}"


def form(config: Row) -> str:
    """The model's name and, for E88, which options are on: the two guides count different forms."""
    mixer = config["mixer"]
    if mixer["kind"] != "e88":
        return NAMES[mixer["kind"]]
    parts = ["gated" if mixer["gate"] else "ungated"]
    if mixer["conv"]:
        parts.append(f"conv {mixer['conv']}")
    if mixer["decay"] != "mamba":
        parts.append(f"decay {mixer['decay']}")
    parts += [key.replace("_", " ") for key in ("head_norm", "write_gate", "tie_kv", "linear_state") if mixer[key]]
    return "E88 " + ", ".join(parts)


def show_description(size: Row) -> None:
    """One configuration."""
    config = size["config"]
    name = f"{size['name']}: " if size["name"] else ""
    title = f"{name}{form(config)}, {shape(config)}, vocabulary {config['vocab_size']}"
    table = _table(title, "", ">", "~")
    table.add_row("[bold]parameters", f"[bold]{human_count(size['params'])}", f"{size['params']:,} exactly")
    for group, count in size["params_by_group"].items():
        table.add_row(f"  {group}", f"{count:,}", f"{count / size['params']:.1%}")
    attention = config["mixer"]["kind"] == "attention"
    remark = f"elements: keys and values of {size['window']} tokens; grows with them" if attention else "elements"
    table.add_row("[bold]state per layer", f"[bold]{size['state_per_layer']:,}", remark)
    total = f"elements; {human_bytes(size['state_bytes'])} in float32 for a sequence"
    table.add_row("  in all", f"{size['state_total']:,}", total)
    for verdict in size["verdicts"]:
        text = f"[bold]{verdict['verdict']}[/] ({verdict['guide']}: {verdict['rule']})"
        table.add_row(verdict["quantity"], f"{verdict['value']:.2f}", text)
    flops = f"FLOPs per token in training, window {size['window']}"
    table.add_row("compute", human_count(size["flops_per_token"]).replace("B", "G"), flops)
    memory = size["memory"]
    parts = ", ".join(f"{key} {human_bytes(memory[key])}" for key in ("weights", "optimizer", "activations"))
    remark = f"estimate for training on {size['batch']} x {size['window']} tokens on a GPU: {parts}; "
    remark += f"gradients, {human_bytes(memory['gradients'])}, come as activations go"
    table.add_row("memory", human_bytes(memory["total"]), remark)
    if "hardware" in size:
        recommended, text = _recommended(size["hardware"])
        table.add_row("recommended n_state", recommended, escape(text))
        if size["recurrence_ns"] is not None:
            remark = escape(f"per token in all layers, forward and backward; {size['hardware']['label']}")
            table.add_row("recurrence", f"{size['recurrence_ns']:,.0f} ns", remark)
    _print(table, *_remarks(size), *_rivals(size.get("against", [])))


def _nanoseconds(time: float | None) -> str:
    return "not measured" if time is None else f"{time:,.0f}"


def _recommended(hardware: Row) -> tuple[str, str]:
    low, high = hardware["low"], hardware["high"]
    text = f"{hardware['label']} ({hardware['source']}): {hardware['reason']}"
    return (str(low) if low == high else f"{low}-{high}"), text


def _remarks(size: Row) -> list[str]:
    warnings = [f"[yellow]warning:[/] {escape(text)}" for text in size["warnings"]]
    return warnings + [f"[dim]note: {escape(text)}[/]" for text in size["notes"]]


def _rivals(rivals: list[Row]) -> list[Table]:
    if not rivals:
        return []
    columns = ("model", "shape", ">params", ">off target", ">state/layer", ">FLOPs/token")
    table = _table("Rivals matched within 1 %", *columns)
    for rival in rivals:
        table.add_row(
            NAMES[rival["config"]["mixer"]["kind"]],
            shape(rival["config"]),
            f"{rival['params']:,}",
            f"{rival['difference']:+.2%}",
            f"{rival['state_per_layer']:,}",
            human_count(rival["flops_per_token"]).replace("B", "G"),
        )
    return [table]


def show_search(result: Row) -> None:
    """Candidates of a search, best first, with what ranked them."""
    first = result["candidates"][0]
    low, text = _recommended(result["hardware"])
    title = f"{form(first['config'])} for {human_count(result['target'])} parameters, within {result['tolerance']:.0%}"
    penalties = list(first["penalties"])
    measured = [">ns/token"] if result["hardware"]["times"] else []
    table = _table(
        title, ">dim", ">depth", ">heads", ">n_state", ">params", ">off target", ">state/layer", ">H*n/dim",
        ">dim/(H*n)", ">dim/depth", *measured, ">score", *(f">{key}" for key in penalties),
    )  # fmt: skip
    for candidate in result["candidates"]:
        config = candidate["config"]
        table.add_row(
            str(config["dim"]),
            str(config["depth"]),
            str(config["mixer"]["n_heads"]),
            str(config["mixer"]["n_state"]),
            f"{candidate['params']:,}",
            f"{candidate['difference']:+.2%}",
            f"{candidate['state_per_layer']:,}",
            f"{candidate['projection_ratio']:.2f}",
            f"{candidate['dim_over_inner']:.2f}",
            f"{config['dim'] / config['depth']:.0f}",
            *(_nanoseconds(candidate["recurrence_ns"]) for _ in measured),
            f"[bold]{candidate['score']:.2f}",
            *(f"{candidate['penalties'][key]:.2f}" for key in penalties),
        )
    lines = [
        "Balanced in both guides: H*n/dim 0.5-2 (balanced guide) and dim/(H*n) 0.8-1.2 (sizing guide).",
        f"Recommended n_state {low}: {escape(text)}.",
        *(["ns/token: the recurrence of all layers, forward and backward, from those times."] if measured else []),
        *([] if result["hardware"]["low"] <= 32 else [SWEEP]),
        f"[dim]{escape(result['ranking'])}[/]",
    ]
    _print(table, *lines, *_rivals(result.get("against", [])))


def show_presets(rows: list[Row]) -> None:
    """The listing of presets."""
    table = _table("Presets", "name", ">params", "model", "shape", ">state/layer", "source", "~about")
    for row in rows:
        table.add_row(
            f"[bold]{row['name']}",
            human_count(row["params"]),
            form(row["config"]),
            shape(row["config"]),
            f"{row['state_per_layer']:,}",
            row["source"],
            escape(row["description"]),
        )
    lines = [
        "Names match in any case. E88_... are rows of the benchmark and the balanced guide (depth 32); where both have",
        "one (b64n32, b32n64) the benchmark's keeps the name and the guide's ends in -guide. Bare h..n.. are rows of",
        "the sizing guide, gated; dim... and plan-... of the scaling plan; state-... of the state analysis.",
        "State of a Transformer: keys and values of 512 tokens.",
    ]
    _print(table, *lines)


def show_tables(result: Row) -> None:
    """The documents' tables, the exact figures beside the printed ones."""
    for table in result["tables"]:
        _print(*_document(table))


def _document(document: Row) -> Iterable[Any]:
    rows = document["rows"]
    formula = any(row["params"]["formula"] is not None for row in rows)
    columns = ["row", "shape", "form", ">params printed"]
    columns += [">its formula"] if formula else []
    columns += [">exact", ">diff", f">{document['ratio']} printed", ">exact", ">diff"]
    columns += [">state printed", ">exact", ">diff", "note"]
    table = _table(document["title"], *columns)
    notes: list[str] = []
    section = ""
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            table.add_section()
            table.add_row(f"[italic]{escape(section)}")
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        value = row["params"]["formula"]
        own = [human_count(value) if value and row["params"]["printed"] else ""] if formula else []
        ratio = row["ratio"]
        table.add_row(
            row["label"],
            shape(row["config"]),
            form(row["config"]),
            row["params"]["printed"] or "",
            *own,
            human_count(row["params"]["exact"]),
            _difference(row["params"]),
            ratio["printed"] or "",
            "" if ratio["exact"] is None else f"{ratio['exact']:.3f}",
            _difference(ratio),
            row["state"]["printed"] or "",
            f"{row['state']['exact']:,}",
            _difference(row["state"]),
            f"({notes.index(row['note']) + 1})" if row["note"] else "",
        )
    yield table
    yield "[dim]* differs at the printed precision[/]"
    for i, note in enumerate(notes, 1):
        yield f"[dim]({i}) {escape(note)}[/]"
    for note in document["notes"]:
        yield f"[dim]{escape(note)}[/]"
    yield ""


def _difference(figure: Row) -> str:
    if figure["difference"] is None:
        return ""
    text = f"{figure['difference']:+.1%}"
    return text if figure["agrees"] else f"[yellow]{text}*[/]"

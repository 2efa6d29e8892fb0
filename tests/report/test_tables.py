"""What may be compared, how it is ranked, what is claimed, and how the table says so."""

from __future__ import annotations

import csv
import io
import random
from typing import Any

import pytest

from e88.errors import UserError
from e88.report.compare import comparisons, count, difference, duration
from e88.report.headline import headline
from e88.report.tables import Row, render_csv, render_markdown, render_terminal, summary_rows


def with_scores(make_record: Any, scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    records = []
    for name, values in scores.items():
        for seed, value in enumerate(values):
            run = make_record(name, seed)
            run["results"] |= {"heldout_bpb": value, "heldout_interval": [value - 0.01, value + 0.01]}
            records.append(run)
    return records


def by_model(rows: list[Row]) -> dict[str, Row]:
    return {row.model: row for row in rows}


def test_rows_are_sorted_and_averaged_over_seeds(study: list[dict[str, Any]]) -> None:
    random.Random(0).shuffle(study)
    rows = summary_rows(study)
    done = [row for row in rows if row.status == "done"]
    assert [row.status for row in rows] == ["done"] * 4 + ["diverged", "failed"]
    scores = [row.heldout_bpb.mean for row in done if row.heldout_bpb]
    assert len(scores) == 4 and scores == sorted(scores)
    e88 = by_model(rows)["tiny-e88"]
    runs = [run for run in study if run["name"] == "tiny-e88"]
    assert e88.seeds == e88.runs == 3 and set(e88.ids) == {run["id"] for run in runs}
    assert e88.train_loss == pytest.approx(sum(run["results"]["train_loss"] for run in runs) / 3)
    assert e88.params == 1_203_456 and e88.state_per_layer == 4096 and e88.projection_ratio == 1.0
    assert e88.heldout_bpb and e88.heldout_bpb.over == "seeds" and e88.backend == "numba"


def test_seed_of_other_settings_is_another_model(make_record: Any) -> None:
    records = [make_record("tiny-e88", seed, training={"lr": lr}) for seed in (0, 1) for lr in (1e-3, 3e-3)]
    rows = summary_rows(records)
    assert {row.model for row in rows} == {"tiny-e88 (lr=0.001)", "tiny-e88 (lr=0.003)"}
    assert all(row.seeds == 2 for row in rows)


def test_other_budget_data_or_hardware_is_another_comparison(make_record: Any) -> None:
    plain = make_record()
    longer, elsewhere, other_data = make_record(seconds=120), make_record(seed=1), make_record(seed=2)
    elsewhere["environment"]["hardware"] = "NVIDIA H100"
    other_data["data"]["hash"] = "0000"
    found = comparisons([plain, longer, elsewhere, other_data, make_record("tiny-gdn")])
    assert [len(comparison.runs) for comparison in found] == [2, 1, 1, 1]
    assert {run["name"] for run in found[0].runs} == {"tiny-e88", "tiny-gdn"}


def test_a_failed_run_joins_the_comparison_it_fits(make_record: Any) -> None:
    stranger = make_record("x", 0, "failed", seconds=999)
    records = [make_record("tiny-gdn", 0, "failed"), make_record("tiny-e88"), stranger]
    found = comparisons(records)
    assert [[run["name"] for run in comparison.runs] for comparison in found] == [["tiny-e88", "tiny-gdn"], ["x"]]


def test_difference_is_paired_by_seed(make_record: Any) -> None:
    # Seeds differ by far more than models do: only pairing tells the models apart.
    records = with_scores(make_record, {"tiny-e88": [2.0, 2.5, 3.0], "tiny-gdn": [2.010, 2.512, 3.011]})
    (comparison,) = comparisons(records)
    gdn, e88 = (next(g for g in comparison.groups if g.label == name) for name in ("tiny-gdn", "tiny-e88"))
    gap = difference(gdn, e88)
    assert gap is not None and gap.n == 3 and gap.mean == pytest.approx(0.011) and gap.excludes_zero
    row = by_model(summary_rows(records))["tiny-gdn"]
    assert row.to_best == gap and "undecided" not in row.to_best_text


def test_headline_claims_only_what_the_interval_carries(make_record: Any) -> None:
    decided = with_scores(make_record, {"tiny-e88": [2.0, 2.5, 3.0], "tiny-gdn": [2.010, 2.512, 3.011]})
    told = headline(comparisons(decided)[0])
    assert told.startswith("At equal training time (60 s), tiny-e88 has the lowest held-out bits per byte: 2.5000")
    assert "tiny-gdn, is 0.0110 behind (95 % interval" in told and "undecided" not in told
    noisy = with_scores(make_record, {"tiny-e88": [2.0, 2.5, 3.0], "tiny-gdn": [2.3, 2.4, 2.9]})
    told = headline(comparisons(noisy)[0])
    assert "tiny-gdn, is 0.0333 behind, but that is undecided" in told and "includes zero" in told


@pytest.mark.parametrize(("rival", "verb"), [(2.015, "overlap"), (2.5, "do not overlap")])
def test_headline_of_one_seed_is_undecided(make_record: Any, rival: float, verb: str) -> None:
    told = headline(comparisons(with_scores(make_record, {"tiny-e88": [2.0], "tiny-gdn": [rival]}))[0])
    assert "one seed" in told and f"windows {verb}" in told and told.endswith("other seeds is undecided.")


def test_headline_names_the_best_e88_where_it_is_not_near_the_top(make_record: Any) -> None:
    scores = {"tiny-gdn": [2.0, 2.1], "tiny-mamba2": [2.2, 2.3], "tiny-transformer": [2.3, 2.5], "tiny-e88": [2.6, 2.7]}
    told = headline(comparisons(with_scores(make_record, scores))[0])
    assert "The next, tiny-mamba2, is 0.2000 behind" in told and "The best E88, tiny-e88, is 0.6000 behind" in told
    assert "Not separated from the best either: tiny-transformer." in told


def test_headline_says_where_shared_seeds_tell_another_story(make_record: Any) -> None:
    records = with_scores(make_record, {"tiny-e88": [2.0], "tiny-gdn": [1.9, 2.9]})
    (comparison,) = comparisons(records)
    told = headline(comparison)
    assert "tiny-e88 has the lowest" in told and "tiny-gdn, is 0.1000 ahead on the one seed they share" in told
    assert any("did not finish the same seeds" in warning for warning in comparison.warnings)


def test_headline_without_a_contest(make_record: Any) -> None:
    assert "nothing to compare" in headline(comparisons([make_record()])[0])
    lost = [make_record("tiny-e88", 0, "failed"), make_record("tiny-e88", 1, "diverged")]
    assert "no model has a held-out figure (runs: 1 diverged, 1 failed)" in headline(comparisons(lost)[0])


def test_a_lost_seed_is_told(make_record: Any) -> None:
    records = [make_record(seed=0), make_record(seed=1), make_record(seed=2, status="diverged")]
    (row,) = summary_rows(records)
    assert (row.seeds, row.runs) == (2, 3) and row.heldout_bpb and row.heldout_bpb.n == 2
    assert row.note.startswith("1 diverged: the loss was not finite at step")
    (comparison,) = comparisons(records)
    assert any("1 of 3 seeds did not finish" in warning for warning in comparison.warnings)


def test_warnings_of_unlike_runs(make_record: Any) -> None:
    assert comparisons([make_record(), make_record("tiny-gdn")])[0].warnings == ()
    unlike = make_record("tiny-gdn", training={"batch_size": 64}, environment={"commit": "abc-dirty"})
    warnings = " ".join(comparisons([make_record(), unlike])[0].warnings)
    assert "batch sizes (16, 64)" in warnings and "2 commits" in warnings and "uncommitted" in warnings


def test_a_key_that_came_later_sets_runs_apart_where_it_says_something(make_record: Any) -> None:
    """Records from before such a key stand beside new ones that give it the meaning it had."""
    same = [make_record(seed=0), make_record(seed=1, training={"carry": 1, "heldout_window": 256})]
    (comparison,) = comparisons(same)
    assert [len(group.runs) for group in comparison.groups] == [2] and not comparison.warnings
    unlike = {"carry": 4, "heldout_window": 64, "heldout_context": 128}
    (comparison,) = comparisons([make_record(), make_record(training=unlike)])
    assert sorted(group.label for group in comparison.groups) == [
        "tiny-e88 (carry=1, heldout_window=256, heldout_context=0)",
        "tiny-e88 (carry=4, heldout_window=64, heldout_context=128)",
    ]
    told = " ".join(comparison.warnings)
    for text in ("carried state (1, 4)", "held-out windows (256, 64)", "held-out context (0, 128)"):
        assert text in told


def test_a_rival_without_its_library_on_a_gpu_is_told(make_record: Any) -> None:
    check = {"tensor": "y", "error": 0.004, "tolerance": 0.03}

    def warnings(backend: str, layer_check: dict[str, Any] | None) -> str:
        rival = make_record("tiny-gdn", environment={"backends": [backend], "layer_check": layer_check})
        return " ".join(comparisons([make_record(), rival])[0].warnings)

    assert "tiny-gdn ran without its library's kernels" in warnings("torch", check)
    assert not warnings("fla 0.6.0 chunk (tilelang)", check) and not warnings("torch", None)


def test_a_short_mean_of_the_loss_is_marked(make_record: Any) -> None:
    short = make_record(seconds=2)
    assert short["results"]["train_loss_steps"] < 100
    (row,) = summary_rows([short])
    for text in (render_terminal([row]), render_markdown([row])):
        assert f"({short['results']['train_loss_steps']} steps)" in text
    assert "steps)" not in render_terminal(summary_rows([make_record()]))


def test_a_diverged_run_shows_no_score(make_record: Any) -> None:
    run = make_record(status="diverged")
    run["results"] |= {"heldout_bpb": 9.9, "train_loss": 31.0}
    (row,) = summary_rows([run])
    assert row.heldout_bpb is None and row.train_loss is None and row.status == "diverged"
    assert "diverged" in render_terminal([row]) and "9.9" not in render_terminal([row])


def test_terminal_in_a_pipe_cuts_nothing(make_record: Any) -> None:
    name = "a-name-" + "of-great-length-" * 12
    text = render_terminal(summary_rows([make_record(name), make_record("[red]x[/red]")]))
    assert name in text and "[red]x[/red]" in text and "…" not in text
    assert "1.20M" in text and "4,096" in text and "(windows)" in text


def test_a_narrow_terminal_says_what_it_leaves_out(study: list[dict[str, Any]]) -> None:
    text = render_terminal(summary_rows(study), width=80)
    table, _, rest = text.partition("Left out for want of width:")
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "Backend" in rest and "Backend" not in table and "Bits/byte" in table
    assert "out of memory" in table
    assert "Left out" not in render_terminal(summary_rows(study), width=300)


def test_markdown_is_one_row_a_model_whatever_the_name(make_record: Any) -> None:
    text = render_markdown(summary_rows([make_record("a|b\n<script>`*"), make_record("tiny-gdn")]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    pipes = [line.replace("\\|", "").count("|") for line in lines]
    assert len(set(pipes)) == 1
    assert "<script>" not in text and r"a\|b &lt;script&gt;\`\*" in text


def test_csv_keeps_unrounded_numbers(study: list[dict[str, Any]]) -> None:
    rows = summary_rows(study)
    read = list(csv.DictReader(io.StringIO(render_csv(rows))))
    assert [line["model"] for line in read] == [row.model for row in rows]
    for line, row in zip(read, rows, strict=True):
        if row.heldout_bpb is None:
            assert line["heldout_bpb"] == "" and line["status"] != "done"
        else:
            assert float(line["heldout_bpb"]) == row.heldout_bpb.mean
            assert float(line["heldout_bpb_low"]) == row.heldout_bpb.low and line["heldout_bpb_over"] == "seeds"
        assert line["ids"].split() == list(row.ids)


def test_no_records_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no records"):
        summary_rows([])


def test_counts_and_durations() -> None:
    told = [count(value) for value in (0, 950, 9999, 57_344, 999_960, 1_203_456, 504e6, 1.33e9, 2.1e15)]
    assert told == ["0", "950", "9999", "57.3K", "1.00M", "1.20M", "504M", "1.33B", "2.1e15"]
    assert [duration(value) for value in (0.5, 30, 600, 36_000)] == ["0.5 s", "30 s", "10 min", "10 h"]


def test_the_terminal_tells_how_many_models_it_left_out(make_record: Any) -> None:
    records = [make_record(f"m{i}", points=1, evals=1) for i in range(105)]
    told = render_terminal(summary_rows(records), width=160)
    assert "and 5 more models, in the report" in told and len(told.splitlines()) < 112
    assert len(render_csv(summary_rows(records)).splitlines()) == 106

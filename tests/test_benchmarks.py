"""The benchmark scripts run, and refuse to report the speed of a kernel that is wrong."""

import importlib.util
import json
import lzma
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from e88.data.corpus import open_corpus
from e88.data.loader import WindowSampler
from e88.study.store import load_records

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name, monkeypatch, capsys, *arguments):
    module = load(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    code = module.main()
    return code, capsys.readouterr().out


SMALL = ("tiny-e88", "--batch-size", "1", "--window", "16", "--seconds", "0", "--device", "cpu")


def test_training_reports_the_share_of_the_ceiling_and_a_profile(monkeypatch, capsys):
    code, out = run("training", monkeypatch, capsys, *SMALL, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["models"]["tiny-e88"]["share_of_ceiling"] > 0
    assert result["environment"]["backends"] == ["numba"]
    assert result["models"]["tiny-e88"]["layer_check"]["backends"] == ["numba"]
    assert any("Recurrence" in row["operation"] for row in result["profile"])


def test_training_reports_no_speed_for_a_wrong_kernel(monkeypatch, capsys):
    import e88.ops.cpu as cpu

    right = cpu.run
    monkeypatch.setattr(cpu, "run", lambda *a: (right(*a)[0] * 1.001, right(*a)[1]))
    code, out = run("training", monkeypatch, capsys, *SMALL)
    assert code == 1 and "no speed is reported" in out and "tok/s" not in out


def test_training_reports_no_speed_for_a_wrong_rival(monkeypatch, capsys):
    from e88.baselines import gated_deltanet

    right = gated_deltanet.gated_delta_rule

    def wrong(qkv, *rest, **options):
        y, state = right(qkv, *rest, **options)
        return (y if qkv.dtype == torch.float64 else y + 0.01 * y.flip(1)), state

    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", wrong)
    code, out = run("training", monkeypatch, capsys, "tiny-gdn", *SMALL[1:])
    assert code == 1 and "tiny-gdn: its layer is wrong" in out and "no speed is reported" in out and "tok/s" not in out


DECODE = ("tiny-e88", "--batch", "1", "2", "--seconds", "0", "--device", "cpu")


def test_decode_reports_its_share_of_the_floor(monkeypatch, capsys):
    code, out = run("decode", monkeypatch, capsys, *DECODE, "--json")
    result = json.loads(out)
    assert code == 0
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert 0 < row["share_of_floor"] and max(row["errors"].values()) < 1e-4
        # 4 bytes of each parameter; 6 heads of 32 x 32 and the convolution's 3 last inputs, read and written.
        assert 1.5e6 < row["weight_bytes"] / 4 < 1.6e6
        assert row["state_bytes"] == 2 * 4 * 8 * row["batch"] * (6 * 32 * 32 + 3 * 3 * 192)


def test_decode_reports_no_speed_for_a_wrong_step(monkeypatch, capsys):
    import e88.ops.cpu as cpu

    right = cpu.run
    monkeypatch.setattr(cpu, "run", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    code, out = run("decode", monkeypatch, capsys, *DECODE)
    assert code == 1 and "no speed is reported" in out and "tok/s" not in out


def test_parallel_says_what_fails():
    module = load("parallel")

    def result(speed, losses=(5.0, 4.0)):
        return module.Result({"results": {"tokens_per_second": speed}}, list(losses))

    found = {
        "alone0": result(100), "alone1": result(90), "beside0": result(99), "beside1": result(80),
        "parts": result(100), "ddp": result(190), "fsdp": result(180, (5.0, 4.1)),
    }  # fmt: skip
    everything = (module.SIDE, *module.MODES)
    told = module.answers(found, 2, everything)
    assert [round(answer["value"], 6) for answer in told.values()] == [0.888889, 1.9, 0.0, 1.8, 0.025]
    assert [answer["holds"] for answer in told.values()] == [False, True, True, False, False]
    del found["fsdp"], found["beside1"]
    told = module.answers(found, 2, everything)
    assert [answer["value"] is None for answer in told.values()] == [True, False, False, True, True]
    assert [answer["holds"] for answer in told.values()] == [False, True, True, False, False]


def test_kill_tells_what_a_killed_study_lost():
    module = load("kill")

    def record(bpb, status="done", unit="steps"):
        config = {"training": {"budget": {unit: 1}}}
        return {"status": status, "results": {"heldout_bpb": bpb}, "config": config}

    calm = {name: [record(2.0)] for name in "abcd"} | {"timed": [record(2.0, unit="seconds")]}
    assert module.differences(calm, {**calm, "timed": [record(2.1, unit="seconds")]}) == []
    killed = {"a": [record(2.0), record(2.0)], "b": [record(2.1)], "c": [record(None, "failed")], "x": [record(2.0)]}
    told = sorted(module.differences(calm, {**killed, "timed": calm["timed"]}))
    assert [line.split()[0] for line in told] == ["a", "b", "c", "d", "x"]


def test_repeats_finds_what_was_read_before_and_what_that_does(tmp_path):
    module = load("repeats")
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 20_000, dtype=np.uint8)))
    corpus = open_corpus(path, cache=tmp_path / "cache")
    sampler, length, seen, shares = WindowSampler(corpus.train, 8, 4, 0, sampling="draws"), len(corpus.train), set(), []
    for step in range(900):
        places = [start + at for start in sampler.starts(step) for at in range(1, 9)]
        shares.append(sum(place in seen for place in places) / 32)
        seen |= set(places)
    found = module.repeated_shares(sampler, length, 8, 900)
    assert found.tolist() == shares and 0.3 < found.mean() < 0.6
    losses = 2 - 1e-4 * np.arange(900) - 0.3 * found + 0.01 * np.random.default_rng(1).standard_normal(900)
    slope, half = module.effect(losses, found)
    assert abs(slope + 0.3) < 2 * half < 0.05
    # Every published pair of a run and its losses can be read.
    store = module.Path(__file__).parent.parent / "results" / "benchmark_500m"
    for file in store.glob("losses-*.json"):
        (record,) = load_records([store], [file.stem.removeprefix("losses-")])
        losses = module.losses_of(store, record["id"])
        assert len(losses) == record["results"]["steps"]
        assert losses[-100:].mean() == pytest.approx(record["results"]["train_loss"], abs=1e-4)


def test_the_findings_are_what_the_records_say(tmp_path):
    module = load("findings")
    for name, (words, by) in module.FIGURES.items():
        drawn = module.picture(words, by, tmp_path / name).read_text()
        assert drawn == (module.ROOT / "docs" / name).read_text()
    text = module.PAGE.read_text()
    assert module.TABLE.findall(text) and module.rewritten(text) == text
    # A figure that is not in a record does not survive.
    before, mark, tables = text.partition("<!-- models ")
    changed = before + mark + re.sub(r"\[1\.\d{4}\]\(", "[1.0000](", tables, count=1)
    assert changed != text and module.rewritten(changed) == text


def test_every_figure_of_the_findings_is_that_of_the_record_it_leads_to():
    module = load("findings")
    led = re.findall(r"\[(\d\.\d{4})\]\(\.\./results/(\w+)/records\.jsonl#L(\d+)\)", module.PAGE.read_text())
    assert len(led) > 30
    for figure, folder, line in led:
        records = (module.ROOT / "results" / folder / "records.jsonl").read_text().splitlines()
        assert figure == f"{json.loads(records[int(line) - 1])['results']['heldout_bpb']:.4f}"


def test_the_text_to_copy_from_is_the_same_each_time_and_mostly_copies():
    module = load("copying")
    first, again = (module.text(100_000, random.Random(7)) for _ in range(2))
    assert first == again and set(first) == set(module.LETTERS) and 100_000 <= len(first) < 100_012
    # Sixteen letters alone are 4 bits each.
    assert 8 * len(lzma.compress(first)) / len(first) < 2.2

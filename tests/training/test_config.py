"""What decides a run, and that runs keep their ids."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from e88.errors import UserError
from e88.training.checkpoint import load_tensors, save_tensors
from e88.training.config import LATER, Budget, TrainingConfig, config_hash, deciding
from e88.training.loop import train

RESULTS = Path(__file__).resolve().parents[2] / "results"


def config(**options):
    return TrainingConfig(budget=Budget(steps=2), batch_size=4, window=16, heldout_bytes=2000, **options)


def run_id(training):
    return config_hash({"dim": 4}, training, "data")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/records.jsonl")), ids=lambda path: path.parent.name)
def test_published_runs_keep_their_ids(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    done = [record for record in records if record["status"] == "done"]
    assert done
    for record in done:
        training = TrainingConfig.from_saved(record["config"]["training"])
        for saved in (record["config"]["training"], training.to_dict()):
            assert config_hash(record["config"]["model"], saved, record["data"]["hash"]) == record["id"]


def test_a_key_that_came_later_counts_where_it_says_something():
    saved = config(sampling="draws").to_dict()
    old = {key: value for key, value in saved.items() if key not in LATER}
    ids = [run_id(old), run_id(saved), run_id({**saved, "heldout_window": 16})]
    assert len(set(ids)) == 1 and deciding(old) == deciding(saved) == deciding({**saved, "heldout_window": 16})
    others = [{"carry": 2}, {"heldout_window": 8}, {"heldout_context": 16}, {"sampling": "passes"}]
    assert len({*ids, *(run_id({**saved, **other}) for other in others)}) == 5
    assert TrainingConfig.from_saved(old) == config(sampling="draws")


def test_a_checkpoint_from_before_such_a_key_goes_on(corpus, tiny, tmp_path):
    train(tiny, config(sampling="draws"), corpus, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, meta = load_tensors(path)
    for key in LATER:
        del meta["training"][key]
    del meta["carried"]
    save_tensors(path, tensors, meta)
    same = config(heldout_window=16, sampling="draws")
    assert train(tiny, same, corpus, tmp_path, resume=True)["results"]["steps"] == 2
    for other, told in (({"carry": 4}, "carry: 1 there, 4"), ({"sampling": "passes"}, "sampling: draws there, passes")):
        with pytest.raises(UserError, match=f"training.{told} asked for"):
            train(tiny, replace(same, **other), corpus, tmp_path, resume=True)


@pytest.mark.parametrize(
    "bad",
    [{"carry": 0}, {"carry": 1.5}, {"carry": True}, {"heldout_window": -1}, {"heldout_context": 0.5},
     {"sampling": "epochs"}],
)  # fmt: skip
def test_senseless_values_are_one_line_errors(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        config(**bad)

import dataclasses

import pytest
import torch

from e88 import runtime
from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.sizing.closed_form import count_params
from e88.training import loop
from e88.training.config import Budget, TrainingConfig
from e88.training.steplog import read_entries

CONFIG = TrainingConfig(budget=Budget(steps=4), batch_size=4, window=16, heldout_bytes=2000)


@pytest.mark.parametrize(
    ("batch", "bytes_per_parameter", "advice"), [(4, 15.9, "take a smaller model, or"), (400, 17, "into more parts")]
)
def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(
    corpus, tiny, tmp_path, monkeypatch, batch, bytes_per_parameter, advice
):
    config = dataclasses.replace(CONFIG, batch_size=batch)
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: int(bytes_per_parameter * count_params(tiny)))
    with pytest.raises(UserError, match=advice):
        loop.train(tiny, config, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: 2**34)
    assert loop.train(tiny, config, corpus, tmp_path / "run")["status"] == "done"


def test_muon_keeps_one_moment_and_is_let_in_where_adamw_is_not(corpus, tmp_path, monkeypatch):
    model = ModelConfig(dim=64, depth=2, mixer=E88Config(n_heads=2, n_state=32))
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: 13 * count_params(model))
    small = dataclasses.replace(CONFIG, batch_size=1, window=8)
    with pytest.raises(UserError, match="take a smaller model"):
        loop.train(model, small, corpus, tmp_path / "adamw")
    muon = dataclasses.replace(small, optimizer="muon")
    assert loop.train(model, muon, corpus, tmp_path / "muon")["status"] == "done"


@pytest.mark.parametrize("when", ["_warm_up", "_evaluate"])
def test_a_full_gpu_is_told_in_one_line_and_the_run_goes_on_elsewhere(corpus, tiny, tmp_path, monkeypatch, when):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, when, full)
        with pytest.raises(UserError, match="4 windows of 16 tokens .* --accumulate") as told:
            loop.train(tiny, CONFIG, corpus, tmp_path / "run")
    assert "\n" not in str(told.value) and told.value.__cause__ is None
    again = loop.train(tiny, CONFIG, corpus, tmp_path / "run", resume=True)
    assert again["status"] == "done" and len(list(read_entries(tmp_path / "run" / "log.jsonl"))) == 4


def test_the_machines_memory_is_that_of_this_machine():
    found = runtime.memory_bytes(torch.device("cpu"))
    assert found is None or 2**28 < found < 2**50

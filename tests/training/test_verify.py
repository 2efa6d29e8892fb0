import pytest
import torch

from e88.baselines import gated_deltanet
from e88.data.corpus import open_corpus
from e88.errors import UserError
from e88.models.config import GatedDeltaNetConfig, ModelConfig
from e88.training import verify as module
from e88.training.config import Budget, TrainingConfig
from e88.training.loop import train
from e88.training.verify import verify

CPU = torch.device("cpu")
MODEL = ModelConfig(dim=16, depth=1, mixer=GatedDeltaNetConfig(n_heads=1, head_dim=16))


def config(**options):
    return TrainingConfig(
        budget=Budget(steps=1), batch_size=2, window=8, heldout_bytes=64, checkpoint_every=0, **options
    )


def test_a_cpu_run_is_not_checked():
    assert verify(MODEL, config(), CPU, 2) is None


@pytest.mark.parametrize("carry", [1, 2])
def test_the_record_carries_the_check(carry, text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    record = train(MODEL, config(precision="fp32", carry=carry), open_corpus(str(text)), tmp_path / "run")
    found = record["environment"]["layer_check"]
    assert found.keys() == {"tensor", "error", "tolerance"} and 0 < found["error"] <= found["tolerance"]
    assert record["environment"]["backends"] == ["torch"] and record["results"]["compile_seconds"] > 0


def test_a_run_that_carries_a_state_is_checked_with_one(monkeypatch):
    real = gated_deltanet.GatedDeltaNet.forward

    def forgetful(self, x, state=None, *, return_state=False):
        exact = next(self.parameters()).dtype == torch.float64
        return real(self, x, state if exact else None, return_state=return_state)

    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(gated_deltanet.GatedDeltaNet, "forward", forgetful)
    assert verify(MODEL, config(precision="fp32"), CPU, 2) is not None
    with pytest.raises(UserError, match="layer is wrong on this machine"):
        verify(MODEL, config(precision="fp32", carry=2), CPU, 2)


def test_a_run_whose_layer_is_wrong_is_refused_and_leaves_no_record(text, tmp_path, monkeypatch):
    right = gated_deltanet.gated_delta_rule

    def wrong(qkv, *rest, **options):
        y, state = right(qkv, *rest, **options)
        return (y if qkv.dtype == torch.float64 else y + 0.01 * y.flip(1)), state

    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", wrong)
    with pytest.raises(UserError, match="gated_deltanet layer is wrong on this machine: .* allowed .*torch"):
        train(MODEL, config(precision="fp32"), open_corpus(str(text)), tmp_path / "run")
    assert not (tmp_path / "run" / "record.json").exists()
    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", right)
    # Nothing was lost: the same folder takes the run once the layer is right.
    record = train(MODEL, config(precision="fp32"), open_corpus(str(text)), tmp_path / "run")
    assert record["status"] == "done"

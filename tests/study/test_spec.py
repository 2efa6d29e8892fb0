import pytest

from e88.errors import UserError
from e88.sizing.presets import PRESETS
from e88.study.spec import RunSpec, make_spec, parse_assignments


def test_specs_from_presets_and_assignments():
    options = parse_assignments(["lr=1e-3", "optimizer=muon", "clip=0.5"])
    assert options == {"lr": 1e-3, "optimizer": "muon", "clip": 0.5}
    s = make_spec("tiny-e88", {**options, "budget": {"steps": 3}})
    assert s.training.lr == 1e-3 and s.training.optimizer == "muon" and s.name == "tiny-e88" and s.data == "stdlib"
    assert RunSpec.from_dict(s.to_dict()) == s
    for bad in ("lr", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_assignments([bad])
    with pytest.raises(UserError, match="did you mean"):
        make_spec("tiny-e88", {"budget": {"steps": 3}, "batchsize": 2})
    with pytest.raises(UserError, match="did you mean"):
        RunSpec.from_dict({"name": "x", "modell": {}})


def test_every_preset_has_a_learning_rate_of_its_own_or_of_its_kind():
    for name in PRESETS:
        training = make_spec(name, {"budget": {"steps": 3}}).training
        if name.startswith("tiny-"):
            assert training.batch_size == 4
        else:
            # As the documents trained them, and nowhere near a tiny model's rate.
            assert (training.batch_size, training.window) == (32, 512) and 1e-4 < training.lr < 1e-3
    for name, lr in (("e88-500m", 6e-4), ("E88_b56n32", 3e-4), ("mamba2-1b", 15e-5)):
        assert make_spec(name, {"budget": {"steps": 3}}).training.lr == lr
    assert make_spec("e88-500m", {"budget": {"steps": 3}, "lr": 1e-3}).training.lr == 1e-3

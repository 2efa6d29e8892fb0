import pytest

from e88.errors import UserError
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

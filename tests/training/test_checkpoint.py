import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from e88.errors import UserError
from e88.models.lm import LanguageModel
from e88.training import checkpoint
from e88.training.checkpoint import flatten, load_model, load_state, load_tensors, save_state, save_tensors, unflatten

CPU = torch.device("cpu")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left"):
        save_tensors(path, {"a": torch.zeros(3)}, {"n": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]


def test_tensors_and_metadata_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(2, 3).T.bfloat16(),
        "empty": torch.empty(0),
    }
    save_tensors(tmp_path / "c", tensors, {"x": [1, None, "y"]})
    got, meta = load_tensors(tmp_path / "c")
    assert meta["x"] == [1, None, "y"]
    assert got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in tensors)


@given(position=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_damage_anywhere_is_noticed(position, flip, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "c.safetensors"
    weights = torch.randn(200)
    save_tensors(path, {"weights": weights}, {"kind": "run"})
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= flip
    path.write_bytes(data)
    try:
        tensors, meta = load_tensors(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        # A blank of the header that became another kind of blank.
        assert torch.equal(tensors["weights"], weights) and meta == {"kind": "run"}


def test_truncated_foreign_and_missing_files_are_one_line_errors(tmp_path):
    good = tmp_path / "good"
    save_tensors(good, {"a": torch.randn(100)}, {})
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-10])
    (tmp_path / "text").write_text("not a checkpoint")
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95\x10")
    (tmp_path / "nothing").write_bytes(b"")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    for name in ("cut", "text", "pickle", "nothing", "foreign", "missing"):
        with pytest.raises(UserError) as caught:
            load_tensors(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_nothing_is_read_with_pickle(tmp_path, tiny, monkeypatch):
    import pickle

    # Modules on the meta device load torch's compiler, whose own import subclasses pickle's reader.
    import torch._dynamo  # noqa: F401

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    model = LanguageModel(tiny)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    save_tensors(tmp_path / "c", tensors, {"kind": "run", "model": tiny.to_dict()})
    windows = torch.randint(256, (2, 9))
    want = model.nll(windows)
    for module, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    again, _ = load_model(tmp_path / "c", CPU)
    assert torch.equal(again.nll(windows), want)


def test_a_state_goes_only_with_its_model(tmp_path, tiny):
    model = LanguageModel(tiny)
    _, state = model.prefill(torch.randint(256, (1, 5)))
    save_state(tmp_path / "s", state, [7], tiny)
    again, pending = load_state(tmp_path / "s", tiny, CPU)
    assert pending == [7]
    for a, b in zip(state, again, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    import dataclasses

    with pytest.raises(UserError, match="another configuration"):
        load_state(tmp_path / "s", dataclasses.replace(tiny, depth=3), CPU)
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path / "s", CPU)
    save_tensors(tmp_path / "run", {"model.a": torch.ones(1)}, {"kind": "run"})
    with pytest.raises(UserError, match="not a state file"):
        load_state(tmp_path / "run", tiny, CPU)


def test_nested_trees_round_trip():
    tree = {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2)}}, "groups": [{"lr": 0.1, "params": [0, 1]}]}
    tensors = {}
    plain = flatten(tree, "optimizer", tensors)
    import json

    again = unflatten(json.loads(json.dumps(plain)), tensors)
    assert again["groups"] == tree["groups"]
    assert torch.equal(again["state"][0]["m"], tree["state"][0]["m"])


def test_a_file_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    path, opened = tmp_path / "c.safetensors", []
    save_tensors(path, {"a": torch.zeros(500)}, {"n": 0})
    open_file = checkpoint.safe_open

    def open_then_replace(*arguments, **options):
        opened.append(len(opened))
        file = open_file(*arguments, **options)
        if len(opened) <= 2:
            save_tensors(path, {"a": torch.full((500,), len(opened))}, {"n": len(opened)})
        return file

    monkeypatch.setattr(checkpoint, "safe_open", open_then_replace)
    tensors, meta = load_tensors(path)
    assert meta["n"] == 2 and (tensors["a"] == 2).all() and len(opened) == 3

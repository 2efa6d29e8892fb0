"""The estimate of training's memory, beside what runs on a GPU took."""

import json
from pathlib import Path

import pytest
import torch

from e88.models.config import E88Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.ops.cuda.plan import make_plan
from e88.sizing.closed_form import count_params
from e88.sizing.memory import kept_states, token_values, training_memory
from e88.sizing.presets import preset

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"


def measured():
    """(where, model, peak bytes) of one H200, batch 32 x 512."""
    for line in (RESULTS / "benchmark_500m" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["config"]["training"]["seed"] == 0:
            model = ModelConfig.from_dict(record["config"]["model"])
            yield model.mixer.kind, model, record["results"]["peak_memory_bytes"]
    for name in ("dim1792-depth38", "E88_b56n32"):
        speed = json.loads((RESULTS / "h200" / f"training-{name}.json").read_text())["models"]
        yield name, preset(name), speed[name]["peak_bytes"]


@pytest.mark.parametrize(("model", "peak"), [pytest.param(m, p, id=where) for where, m, p in measured()])
def test_the_estimate_is_a_little_below_what_runs_took(model: ModelConfig, peak: int) -> None:
    assert 0.92 < training_memory(model, 32, 512)["total"] / peak < 1


def test_memory_is_its_parts() -> None:
    config = preset("e88-100m")
    memory = training_memory(config, batch=4, window=128)
    largest = max(memory["activations"], memory["gradients"])
    assert memory["total"] == memory["weights"] + memory["optimizer"] + largest
    assert memory["optimizer"] == 2 * memory["gradients"] == 8 * count_params(config)
    assert training_memory(config, batch=8, window=128)["activations"] == 2 * memory["activations"]


@pytest.mark.parametrize(
    ("n_state", "expand_v"), [(8, 1), (16, 1), (24, 1), (32, 1), (32, 2), (48, 1), (64, 1), (128, 1)]
)
@pytest.mark.parametrize("linear", [False, True])
def test_states_are_kept_as_the_kernels_keep_them(n_state: int, expand_v: float, linear: bool) -> None:
    mixer = E88Config(n_heads=56, n_state=n_state, expand_v=expand_v, linear_state=linear)
    plan = make_plan(mixer.head_k_dim, mixer.head_v_dim, torch.bfloat16, not linear, False)
    assert kept_states(mixer) == (plan.segment, plan.saved_dtype.itemsize)


FORMS = {
    "plain": E88Config(n_heads=8, n_state=32),
    "gated": E88Config(n_heads=8, n_state=32, conv=4, gate=True, write_gate=True),
    "normed": E88Config(n_heads=8, n_state=32, head_norm=True, expand_v=2.0),
    "tied": E88Config(n_heads=8, n_state=32, tie_kv=True, conv=4),
    "large states": E88Config(n_heads=2, n_state=128),
}
SMALL = {name: ModelConfig(dim=256, depth=2, mixer=mixer) for name, mixer in FORMS.items()}
SMALL |= {name: preset(name) for name in ("tiny-gdn", "tiny-mamba2", "tiny-transformer")}


@pytest.mark.parametrize("name", SMALL)
def test_on_a_cpu_no_model_keeps_fewer_values(name: str) -> None:
    model, kept = LanguageModel(SMALL[name]), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # With its tensor, so that no other comes to lie there.
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.nll(torch.randint(256, (2, 129))).mean()
    assert loss.requires_grad and sum(size for size, _ in kept.values()) > 4 * 2 * 128 * token_values(SMALL[name])

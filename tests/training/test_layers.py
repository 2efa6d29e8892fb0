import json
import math

import pytest
import torch

from e88.data.loader import WindowSampler
from e88.errors import UserError
from e88.models.config import E88Config, GatedDeltaNetConfig, ModelConfig
from e88.models.lm import LanguageModel
from e88.ops.edges import log_decay
from e88.training.config import Budget, TrainingConfig, config_hash
from e88.training.distributed import Group
from e88.training.layers import DECAY_EDGES, SATURATED, LayerStats
from e88.training.loop import train
from e88.training.step import backward
from e88.training.steplog import read_entries


def config(steps=4, **options):
    return TrainingConfig(
        **{"budget": Budget(steps=steps), "batch_size": 4, "window": 16, "heldout_bytes": 2000, **options}
    )


def entries(folder):
    return list(read_entries(folder / "log.jsonl"))


GDN = GatedDeltaNetConfig(n_heads=2, head_dim=8)
# Every way to come to a decay, a state or an output.
E88S = [
    {"gate": True, "conv": 4},
    {"decay": "sigmoid", "write_gate": True},
    {"decay": "constant", "head_norm": True},
    {"decay": "none", "linear_state": True, "tie_kv": True},
]


@pytest.mark.parametrize("mixer", [*(E88Config(n_heads=2, n_state=8, **options) for options in E88S), GDN])
@pytest.mark.parametrize("parts", [1, 2])
def test_looking_into_the_layers_changes_no_number(mixer, parts, corpus, tmp_path):
    model = ModelConfig(dim=16, depth=2, mixer=mixer)
    seen = train(model, config(layers_every=1, accumulate=parts), corpus, tmp_path / "seen")
    blind = train(model, config(layers_every=0, accumulate=parts), corpus, tmp_path / "blind")
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in entries(tmp_path / "seen")] == [e[key] for e in entries(tmp_path / "blind")]
    assert seen["results"]["heldout_bpb"] == blind["results"]["heldout_bpb"]
    assert seen["id"] == blind["id"] == config_hash(model.to_dict(), config(accumulate=parts).to_dict(), corpus.hash)
    assert blind["layers"] is None and all("layers" not in e for e in entries(tmp_path / "blind"))
    assert all("layers" in e for e in entries(tmp_path / "seen"))


@pytest.mark.parametrize("options", E88S)
def test_the_statistics_are_those_of_the_states_decays_and_gradients(options, corpus):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=8, **options)))
    # Large inputs to the recurrence, so that some states are saturated.
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.qkv_proj.weight.mul_(40)
    windows = torch.from_numpy(WindowSampler(corpus.train, 16, 4, 0).batch(0))
    stats = LayerStats(model, Group(torch.device("cpu")))
    with stats.watching():
        backward(model.nll, windows, config(accumulate=2))
    found = stats.read()

    _, states = model.hidden(windows[:, :-1], return_state=True)
    decays = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(
            lambda layer, inputs: decays.append(
                log_decay(*layer.decay(inputs[0], layer.a_proj and layer.a_proj(inputs[0]))).exp()
            )
        )
    model.hidden(windows[:, :-1])
    for i, block in enumerate(model.blocks):
        size = states[i]["S"].abs()
        assert found["state_max"][i] == pytest.approx(size.max().item(), rel=1e-4)
        shares = torch.histogram(decays[i].detach(), torch.tensor([-1, *DECAY_EDGES, 2.0])).hist / decays[i].numel()
        assert found["decay"][i] == pytest.approx(shares.tolist(), abs=1e-4)
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in block.parameters()))
        assert found["grad_norm"][i] == pytest.approx(norm, rel=1e-4)
        if "linear_state" in options:
            assert "saturated" not in found
        else:
            share = (size > SATURATED).float().mean().item()
            assert found["saturated"][i] == pytest.approx(share, abs=1e-4)
    assert found["embedding_grad_norm"] == pytest.approx(model.embedding.weight.grad.norm().item(), rel=1e-4)
    # Nothing stays behind.
    assert not any(block.mixer._forward_hooks for block in model.blocks)
    assert "linear_state" in options or max(found["saturated"]) > 0


def test_the_record_sums_up_the_samples(corpus, tiny, tmp_path):
    record = train(tiny, config(7, layers_every=3), corpus, tmp_path / "run")
    sampled = [e for e in entries(tmp_path / "run") if "layers" in e]
    assert [e["step"] for e in sampled] == [1, 4, 7]
    layers = record["layers"]
    assert layers["samples"] == 3 and layers["last_step"] == 7
    assert layers["decay"] == sampled[-1]["layers"]["decay"] and len(layers["decay"]) == 2
    for name in ("state_max", "grad_norm"):
        assert layers[f"largest_{name}"] == [max(e["layers"][name][i] for e in sampled) for i in (0, 1)]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["layers"] == layers


def test_a_rival_has_gradient_norms_alone(corpus, tmp_path):
    record = train(ModelConfig(dim=16, depth=2, mixer=GDN), config(1), corpus, tmp_path / "run")
    assert len(record["layers"]["grad_norm"]) == 2
    assert not {"state_max", "saturated", "decay"} & set(record["layers"])


def test_a_hybrid_has_the_states_of_its_e88_blocks(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    e88 = E88Config(n_heads=2, n_state=8)
    model = ModelConfig(dim=16, depth=4, mixer=GDN, hybrid=e88, hybrid_every=2)
    layers = train(model, config(3, layers_every=1), corpus, tmp_path / "run", tensorboard=True)["layers"]
    assert len(layers["grad_norm"]) == 4 and all(norm > 0 for norm in layers["grad_norm"])
    for name in ("state_max", "largest_state_max", "saturated", "decay"):
        assert [value is None for value in layers[name]] == [True, False, True, False]
    last = entries(tmp_path / "run")[-1]["layers"]
    assert layers["state_max"] == last["state_max"] and layers["largest_state_max"][1] >= last["state_max"][1] > 0


@pytest.mark.parametrize("every", [-1, 0.5, True])
def test_an_interval_is_a_number_of_steps(every):
    with pytest.raises(UserError, match="layers_every"):
        config(layers_every=every)


def test_tensorboard_shows_the_layers(corpus, tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny, config(3, layers_every=2), corpus, tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = entries(tmp_path / "run")
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    saturated = events.Scalars("saturated/01")
    assert [e.step for e in saturated] == [1, 3]
    assert saturated[1].value == pytest.approx(logged[2]["layers"]["saturated"][1])
    decay = events.Histograms("decay/00")[-1]
    assert decay.step == 3 and decay.histogram_value.bucket == pytest.approx(logged[2]["layers"]["decay"][0])

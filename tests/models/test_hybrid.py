"""Models whose every n-th block has another mixer."""

import dataclasses

import pytest
import torch

from e88.baselines import transformer
from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.models.generate import Decoder, prepare
from e88.models.lm import LanguageModel
from e88.sizing.closed_form import describe, flops_per_token, params_by_group, state_per_layer, state_total
from e88.sizing.exact import exact_params_by_group
from e88.sizing.fit import fit
from e88.sizing.memory import training_memory
from e88.study.design import parse_study
from e88.study.shapes import Shrink, shrunk
from e88.training import verify as module
from e88.training.config import Budget, TrainingConfig
from e88.training.verify import verify

E88 = E88Config(n_heads=3, n_state=4, gate=True, conv=4)
OTHERS = [
    AttentionConfig(n_heads=4),
    E88Config(n_heads=1, n_state=16, gate=True, conv=4),
    GatedDeltaNetConfig(n_heads=2, head_dim=8),
    Mamba2Config(d_state=8, head_dim=8, chunk=4),
]


def hybrid(other, **options):
    return ModelConfig(**{"dim": 16, "depth": 5, "mixer": E88, "hybrid": other, "hybrid_every": 2, **options})


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.kind)
def test_blocks_alternate_and_step_as_they_read(other):
    config = hybrid(other, mlp_hidden=24)
    assert config.mixers == (E88, other, E88, other, E88)
    torch.manual_seed(0)
    model = LanguageModel(config).double()
    tokens = torch.randint(256, (2, 11))
    whole, state, logits = model(tokens), model.init_state(2), []
    for t in range(11):
        out, state = model.step(tokens[:, t], state)
        logits.append(out)
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-9, atol=1e-9)
    last, reached = model.prefill(tokens[:, :6])
    torch.testing.assert_close(last, whole[:, 5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(tokens[:, 6:], reached), whole[:, 6:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.kind)
def test_sizes_are_those_of_the_blocks(other):
    config = hybrid(other, mlp_hidden=24)
    assert params_by_group(config) == exact_params_by_group(config)
    e88, rest = config.parts()
    assert (e88.depth, rest.depth, rest.mixer, rest.hybrid) == (3, 2, other, None)
    head = 6 * config.vocab_size * config.dim
    assert flops_per_token(config) - head == sum(flops_per_token(part) - head for part in (e88, rest))
    total = 3 * state_per_layer(e88) + 2 * state_per_layer(rest)
    assert state_total(config) == total and state_per_layer(config) == round(total / 5)
    assert describe(config)["state_bytes"] == 4 * total
    logits = 2 * 32 * 512 * 4 * config.vocab_size
    activations = [training_memory(c)["activations"] - logits for c in (config, e88, rest)]
    assert activations[0] == sum(activations[1:])


def test_the_saved_form_has_it_only_where_there_is_one():
    plain, config = ModelConfig(dim=16, depth=5, mixer=E88), hybrid(OTHERS[0])
    assert not {"hybrid", "hybrid_every"} & plain.to_dict().keys()
    assert ModelConfig.from_dict(config.to_dict()) == config
    larger = {**plain.to_dict(), "hybrid": {"kind": "e88", "n_heads": 1, "n_state": 16}, "hybrid_every": 2}
    assert ModelConfig.from_dict(larger) == hybrid(OTHERS[1])


@pytest.mark.parametrize("options", [{"a_low": 1.0}, {"a_low": 1.0, "a_high": 4.0}, {"a_low": 0.5}])
def test_a_hybrid_at_the_default_is_saved_beside_a_mixer_that_is_not(options):
    mixer = dataclasses.replace(E88, a_low=0.5)
    config = ModelConfig(dim=16, depth=5, mixer=mixer, hybrid=dataclasses.replace(mixer, **options), hybrid_every=2)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_another_mixer_takes_a_hybrid_of_its_kind_along():
    config = hybrid(dataclasses.replace(E88, n_heads=1, n_state=16))
    changed = config.with_mixer(dataclasses.replace(E88, n_heads=5, conv=2), dim=24)
    assert changed.mixer == dataclasses.replace(E88, n_heads=5, conv=2) and changed.dim == 24
    assert changed.hybrid == dataclasses.replace(E88, n_heads=1, n_state=16, conv=2)
    assert config.with_mixer(E88, hybrid=OTHERS[0]).hybrid == OTHERS[0]
    for other in OTHERS:
        if other.kind != "e88":
            assert hybrid(other).with_mixer(dataclasses.replace(E88, conv=2)).hybrid == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hybrid": None}, "hybrid_every needs hybrid"),
        ({"hybrid_every": 0}, "hybrid_every must be from 2 to depth = 5, got 0"),
        ({"hybrid_every": 6}, "hybrid_every must be from 2 to depth = 5, got 6"),
        ({"hybrid": AttentionConfig(n_heads=3)}, "dim 16 does not divide into 3 heads"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        hybrid(OTHERS[0], **options)


def test_shapes_are_searched_for_one_mixer():
    with pytest.raises(UserError, match="leave out hybrid"):
        fit(10**6, hybrid(OTHERS[0]), depth=4, n_state=4, ratio=1, tolerance=0.1)


def test_both_mixers_are_checked_before_a_run(monkeypatch):
    config = TrainingConfig(budget=Budget(steps=1), batch_size=2, window=8, precision="fp32")
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    assert verify(hybrid(OTHERS[0]), config, torch.device("cpu"), 2) is not None
    right = transformer.Attention.forward

    def wrong(self, x, state=None, *, return_state=False):
        y, state = right(self, x, state, return_state=return_state)
        return (y if y.dtype == torch.float64 else y + 0.01 * y.flip(1)), state

    monkeypatch.setattr(transformer.Attention, "forward", wrong)
    with pytest.raises(UserError, match="the attention layer is wrong on this machine"):
        verify(hybrid(OTHERS[0]), config, torch.device("cpu"), 2)


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.kind)
def test_a_backend_is_for_the_mixers_that_know_it(other, monkeypatch):
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    model, windows = LanguageModel(hybrid(other)), torch.randint(256, (1, 9))
    mine, theirs = model.blocks[0].mixer, model.blocks[1].mixer
    for name in {"auto", *mine.backends, *theirs.backends}:
        model.set_backend(name)
        for mixer in (mine, theirs):
            assert mixer.backend == (name if name in mixer.backends else "auto")
        # What is not to be had here is no unknown name to the mixer itself.
        try:
            model.nll(windows)
        except UserError as error:
            assert f"backend '{name}' cannot serve" in str(error)
    config = TrainingConfig(budget=Budget(steps=1), batch_size=2, window=8, precision="fp32", backend="reference")
    assert verify(hybrid(other), config, torch.device("cpu"), 2) is not None
    model.set_backend("reference")
    for refused in (
        lambda: model.set_backend("no-such"),
        lambda: verify(hybrid(other), dataclasses.replace(config, backend="no-such"), torch.device("cpu"), 2),
    ):
        with pytest.raises(UserError, match="unknown backend 'no-such'.*"):
            refused()
    assert mine.backend == "reference"


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.kind)
def test_a_prepared_model_goes_on_as_it_would_have(other):
    torch.manual_seed(0)
    model = LanguageModel(hybrid(other))
    prompt = torch.randint(256, (1, 9))
    expected = model(prompt)[:, -1].argmax(-1)
    decoder = Decoder(prepare(model, torch.float32))
    decoder.read(prompt)
    assert decoder.logits is not None and decoder.logits.argmax(-1) == expected
    assert len(list(decoder.tokens(4))) == 4


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.kind)
def test_a_study_has_hybrids_whole_and_shrunk(other):
    given = {"kind": other.kind, **dataclasses.asdict(other)}
    models = {"a": {"preset": "e88-500m", "hybrid": given, "hybrid_every": 4}}
    if other.kind == "mamba2":
        models["a"]["dim"] = 2048
    study = parse_study("test", {
        "scales": {"full": {}, "smoke": {"shrink": {"width": 16, "depth": 8, "tolerance": 0.2}}},
        "budgets": {"data": {"smoke": {"steps": 3}, "full": {"steps": 4}}},
        "models": models,
    })  # fmt: skip
    full, smoke = study.model("a"), study.model("a", study.scales["smoke"])
    assert full.hybrid == other and [m.kind for m in full.mixers[:4]] == ["e88", "e88", "e88", other.kind]
    assert smoke.hybrid is not None and smoke.hybrid.kind == other.kind and 2 <= smoke.hybrid_every <= smoke.depth
    assert shrunk(full, Shrink()) == full
    LanguageModel(smoke).init_state(1)

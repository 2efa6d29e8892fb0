"""Specs: models by a rule, grids, matched sizes, and the studies that are published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e88.cli.study_view import plan_rows
from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, Mamba2Config, MixerConfig, ModelConfig
from e88.sizing.closed_form import block_params, count_params, projection_ratio
from e88.sizing.presets import PRESETS
from e88.study.cost import Throughput
from e88.study.design import Experiment, load_study, parse_study
from e88.study.judge import judge
from e88.study.shapes import Shrink, shrunk

STUDIES = Path(__file__).resolve().parents[2] / "studies"
SMALL = Shrink(width=8, depth=4, tolerance=0.1)


def table(**parts: Any) -> dict[str, Any]:
    return {
        "scales": {"full": {}, "smoke": {"seeds": 2, "shrink": {"width": 16, "depth": 8, "tolerance": 0.2}}},
        "budgets": {"data": {"smoke": {"steps": 3}, "full": {"steps": 4}}},
        "training": {"batch_size": 4, "window": 16, "heldout_bytes": 2000},
        "models": {"a": {"preset": "E88_b56n32"}},
        **parts,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_shrinking_keeps_kind_heads_width_and_the_share_of_parameters(name: str) -> None:
    config = PRESETS[name].config
    small = shrunk(config, SMALL)
    assert small.mixer.kind == config.mixer.kind and small.dim == pytest.approx(config.dim / 8, rel=0.25, abs=16)
    if isinstance(config.mixer, E88Config) and isinstance(small.mixer, E88Config):
        assert small.mixer.n_state == config.mixer.n_state and small.mixer.gate == config.mixer.gate
        if config.mixer.n_heads >= 24:
            assert projection_ratio(small) == pytest.approx(projection_ratio(config), rel=0.25)
    wanted = config.depth * block_params(config) / SMALL.params
    # The depth is a whole number, at least one.
    assert abs(small.depth * block_params(small) - wanted) <= max(
        0.51 * block_params(small), block_params(small) - wanted
    )
    assert shrunk(config, Shrink()) == config != shrunk(config, Shrink(width=2, depth=0.25))


@pytest.mark.parametrize(
    ("mixer", "others"),
    [
        (Mamba2Config(expand=3), {}),
        (Mamba2Config(n_groups=8, head_dim=32), {}),
        (Mamba2Config(head_dim=32), {"dim": 1600, "hybrid": AttentionConfig(n_heads=40), "hybrid_every": 4}),
        (AttentionConfig(n_heads=40), {"dim": 1600, "hybrid": Mamba2Config(head_dim=32), "hybrid_every": 4}),
    ],
)
def test_shrinking_keeps_heads_whole(mixer: MixerConfig, others: dict[str, Any]) -> None:
    config = ModelConfig(mixer=mixer, **{"dim": 1536, "depth": 16, **others})
    small = shrunk(config, SMALL)
    assert small.dim == pytest.approx(config.dim / 8, rel=0.35) and small.mixers[0].kind == mixer.kind
    wanted = sum(part.depth * block_params(part) for part in config.parts()) / SMALL.params
    assert sum(part.depth * block_params(part) for part in small.parts()) == pytest.approx(wanted, rel=0.35)


def test_models_are_solved_matched_and_overridden() -> None:
    models = {
        "a": {"preset": "E88_b56n32", "linear_state": True, "depth": 30},
        "wide{dim}": {"kind": "e88", "params": "500M", "n_state": 32, "vary": {"dim": [1536, 2560]}},
        "rival": {"preset": "mamba2-500m", "match": "a"},
        "same": {"kind": "mamba2", "match": "a"},
        "own": {"preset": "E88_b56n32", "smoke": {"preset": "tiny-e88"}},
        "wide": {"preset": "e88-500m", "match": "a", "branch_gain": 4.0},
        "doc": {"preset": "gdn-500m-doc", "match": "a"},
        "normed": {"preset": "transformer-500m", "qk_norm": True, "match": "a"},
        "there": {"preset": "tiny-e88", "smoke": {"preset": "gdn-500m", "match": "a"}},
    }
    study = parse_study("test", table(models=models))
    full, smoke = study.model, lambda name: study.model(name, study.scales["smoke"])
    assert full("a").depth == 30 and full("a").mixer.linear_state and smoke("a").mixer.linear_state  # type: ignore
    for dim in (1536, 2560):
        config = full(f"wide{dim}")
        ratio = projection_ratio(config)
        assert config.dim == dim and count_params(config) == pytest.approx(5e8, rel=0.01)
        assert ratio is not None and 0.8 < ratio < 1.25
        assert smoke(f"wide{dim}").dim == dim / 16
    assert full("rival") == PRESETS["mamba2-500m"].config
    assert count_params(full("same")) == pytest.approx(count_params(full("a")), rel=0.01)
    assert count_params(smoke("rival")) == pytest.approx(count_params(smoke("a")), rel=0.2)
    assert smoke("own") == PRESETS["tiny-e88"].config
    assert count_params(smoke("there")) == pytest.approx(count_params(smoke("a")), rel=0.2)
    # Only dimensions are found: what a preset is apart from them stays.
    for name in ("wide", "doc", "normed"):
        small, mixer = smoke(name), full(name).mixer
        sizes = {key: getattr(mixer, key) for key in ("n_heads", "head_dim") if hasattr(mixer, key)}
        assert count_params(small) == pytest.approx(count_params(smoke("a")), rel=0.2)
        assert replace(small.mixer, **sizes) == mixer and small.branch_gain == full(name).branch_gain


def test_models_are_matched_and_solved_with_the_vocabulary_of_the_tokenizer(tmp_path: Path) -> None:
    vocabulary = {str(i): i for i in range(5000)}
    (tmp_path / "words.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    models = {
        "a": {"preset": "plan-100m", "smoke": {"preset": "tiny-e88"}},
        "b": {"kind": "gdn", "match": "a"},
        "c": {"preset": "mamba2-100m", "match": "a"},
        "d": {"kind": "e88", "params": "100M"},
        "e": {"kind": "transformer", "params": "100M"},
    }
    study = parse_study("test", {**table(models=models), "tokenizer": str(tmp_path / "words.json")})
    smoke = study.scales["smoke"]
    for name, scale, target in (
        ("b", None, count_params(study.model("a"))), ("b", smoke, count_params(study.model("a", smoke))),
        ("c", smoke, count_params(study.model("a", smoke))), ("d", None, 1e8), ("e", None, 1e8),
    ):  # fmt: skip
        config = study.model(name, scale)
        assert config.vocab_size == 5000
        assert count_params(config) == pytest.approx(target, rel=0.2 if scale else 0.01)


def test_an_experiment_has_each_run_once_seed_by_seed(text: Path) -> None:
    models = {"a": {"preset": "plan-medium"}, "b": {"preset": "plan-depth32"}, "c": {"preset": "plan-depth16"}}
    claim = {"says": "", "source": "", "lower": ["a", "c"]}
    study = parse_study("test", table(models=models, claims={"x": claim}), data=str(text))
    experiment = study.at("smoke")
    assert len(experiment.planned) == 6 and len(experiment.runs) == 4
    assert [run.spec.training.seed for run in experiment.runs] == [0, 0, 1, 1]
    assert experiment.planned["a", "data", 1].id == experiment.planned["b", "data", 1].id
    assert len(study.at("smoke", claims=["x"], seeds=5).runs) == 10
    assert len({run.id for run in experiment.runs} | {run.id for run in study.at("full").runs}) == 6


def test_a_whole_number_is_the_same_model_as_its_float(text: Path) -> None:
    options: list[dict[str, Any]] = [{"expand_v": 2, "branch_gain": 4}, {"expand_v": 2.0, "branch_gain": 4.0}]
    models = {name: {"preset": "plan-medium", **given} for name, given in zip("ab", options, strict=True)}
    runs = parse_study("test", table(models=models), data=str(text)).at("smoke").runs
    assert len(runs) == 2
    for run in runs:
        saved = run.spec.model.to_dict()
        assert json.dumps(ModelConfig.from_dict(saved).to_dict()) == json.dumps(saved)
        assert (repr(saved["mixer"]["expand_v"]), repr(saved["branch_gain"])) == ("2.0", "4.0")


def test_a_model_may_have_its_own_training_at_all_scales_or_one(text: Path) -> None:
    own = {"lr": 1e-3, "clip": 0.5, "full": {"lr": 2e-3}}
    study = parse_study("test", table(models={"a": {"preset": "plan-medium", "training": own}}), data=str(text))
    found = [study.at(scale).runs[0].spec.training for scale in ("smoke", "full")]
    assert [(t.lr, t.clip, t.batch_size) for t in found] == [(1e-3, 0.5, 4), (2e-3, 0.5, 4)]


def test_a_model_may_have_its_own_number_of_seeds(text: Path) -> None:
    models = {"a": {"preset": "plan-medium", "seeds": 3}, "c": {"preset": "plan-depth16"}}
    claim = {"says": "", "source": "", "lower": ["a", "c"]}
    study = parse_study("test", table(models=models, claims={"x": claim}), data=str(text))
    experiment = study.at("smoke")
    assert [(m, s) for m, _, s in experiment.planned] == [("a", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    assert list(experiment.of("a", "data")) == [0, 1, 2] and list(experiment.of("c", "data")) == [0, 1]
    (verdict,) = judge(experiment, {})
    assert verdict.outcome == "undecided"
    # Asked for on the command line, the number is everyone's.
    assert len(study.at("smoke", seeds=1).runs) == 2
    plan = plan_rows(experiment, set(), Throughput([]))
    assert [(row["runs"], row["gpus"]) for row in plan] == [(3, 1), (2, 1)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"modells": {}}, "did you mean"),
        ({"models": {}}, r"\[models.NAME\]"),
        ({"models": {"a": "tiny-e88"}}, "must be a table"),
        ({"models": {"a": {"dim": 3}}}, "needs a preset"),
        ({"models": {"a{x}": {"preset": "tiny-e88", "vary": {"dim": [1]}}}}, "vary only"),
        ({"models": {"a": {"preset": "tiny-e88", "vary": {"dim": [64, 96]}}}}, "two models are named 'a'"),
        ({"models": {"a": {"kind": "gdn", "match": "b"}, "b": {"kind": "e88", "match": "a"}}}, "circle: a -> b -> a"),
        ({"models": {"a": {"preset": "tiny-e88"}, "b": {"kind": "e88", "match": "aa"}}}, "unknown model"),
        ({"models": {"a": {"preset": "tiny-e99"}}}, "did you mean"),
        ({"models": {"a": {"preset": "tiny-e88", "headz": 1}}}, "unknown"),
        ({"models": {"a": {"kind": "mamba2", "params": "1M", "dim": 64}}}, "drop dim"),
        ({"models": {"a": {"preset": "E88_b56n32"}, "b": {"kind": "gdn", "match": "a", "conv": 0}}}, "drop conv"),
        ({"models": {"a": {"preset": "E88_b56n32"}, "b": {"preset": "e88-500m-memory", "match": "a"}}}, "leave out"),
        (
            {
                "models": {
                    "a": {"preset": "E88_b56n32"},
                    "b": {"preset": "transformer-500m", "mlp_hidden": 0, "match": "a"},
                }
            },
            "attention with an MLP",
        ),
        ({"scales": {"smoke": {"seeds": 0}}}, "seeds must be"),
        ({"scales": {"smoke": {"sees": 1}}}, "unknown"),
        ({"models": {"a": {"preset": "tiny-e88", "seeds": "3"}}}, "seeds must be"),
        ({"budgets": {"data": {"huge": {"steps": 1}}}}, "huge"),
        ({"budgets": {"data": {"full": {"steps": 1}}}}, "says nothing of scale"),
        ({"budgets": {"data": {"smoke": {"steps": 1}, "exclusive": ["huge"]}}}, "list of scales"),
        ({"training": {"batchsize": 4}}, "did you mean"),
    ],
)
def test_wrong_specs_are_refused_in_one_line(text: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        _ = parse_study("test", table(**parts), data=str(text)).at("smoke").runs
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_published_studies_can_run_at_every_scale(path: Path, text: Path) -> None:
    study = load_study(path, data=str(text))
    assert {"smoke", "full"} <= set(study.scales)
    for scale in study.scales:
        check_experiment(study.at(scale))


def check_experiment(experiment: Experiment) -> None:
    assert experiment.claims and experiment.runs
    sizes = {name: count_params(config) for name, config in experiment.configs.items()}
    if experiment.scale.name == "smoke":
        assert max(sizes.values()) < 600_000 and len(experiment.runs) <= 140
    if experiment.study.name == "dimension_sweep":
        assert max(sizes.values()) <= min(sizes.values()) * (1.02 if experiment.scale.name == "full" else 1.2)
    for name, config in experiment.configs.items():
        assert ModelConfig.from_dict(config.to_dict()) == config, name

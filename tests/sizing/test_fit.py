import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.sizing.closed_form import count_params
from e88.sizing.fit import OFF_RATIO, fit
from e88.sizing.presets import preset


@given(
    target=st.integers(30_000, 2_000_000), depth=st.integers(1, 12), n_state=st.sampled_from([8, 16, 32]),
    ratio=st.floats(0.5, 2), tolerance=st.sampled_from([0.01, 0.05]), hidden=st.sampled_from([0, 64]),
)  # fmt: skip
def test_a_shape_has_the_count_and_what_was_asked_for(target, depth, n_state, ratio, tolerance, hidden):
    mixer = E88Config(n_heads=1, gate=True, conv=4)
    template = ModelConfig(dim=32, depth=1, mixer=mixer, mlp_hidden=hidden)
    found = fit(target, template, depth=depth, n_state=n_state, ratio=ratio, tolerance=tolerance)
    if found is None:
        return
    assert abs(count_params(found) - target) <= tolerance * target
    assert found.depth == depth and found.mixer.n_state == n_state and found.mixer.gate and found.mixer.conv == 4
    assert abs(math.log2(found.mixer.d_inner / found.dim / ratio)) <= OFF_RATIO
    assert found.mlp_hidden == (hidden and round(hidden * found.dim / 32))


@pytest.mark.parametrize("name", ["tiny-e88", "e88-500m"])
def test_a_preset_is_found_again(name):
    config = preset(name)
    ratio = config.mixer.d_inner / config.dim
    found = fit(
        count_params(config), config, depth=config.depth, n_state=config.mixer.n_state, ratio=ratio, tolerance=1e-6
    )  # fmt: skip
    assert found == config


def test_most_points_of_a_small_space_have_a_shape():
    points = [(d, n, r) for d in (2, 4, 8) for n in (16, 32) for r in (0.5, 0.7, 1, 1.4, 2)]
    template = preset("tiny-e88")
    found = [fit(300_000, template, depth=d, n_state=n, ratio=r, tolerance=0.03) for d, n, r in points]
    assert sum(config is not None for config in found) >= 0.9 * len(points)


def test_a_count_out_of_reach_and_another_kind():
    assert fit(1000, preset("tiny-e88"), depth=4, n_state=32, ratio=1, tolerance=0.03) is None
    with pytest.raises(UserError, match="not for mamba2"):
        fit(1000, preset("tiny-mamba2"), depth=4, n_state=32, ratio=1, tolerance=0.03)

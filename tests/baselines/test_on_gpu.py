"""The rivals through their libraries, on a GPU that has them."""

import pytest
import torch

from e88.layers.accuracy import check, relative_error
from e88.layers.mixer import build_mixer, rival_libraries
from e88.models.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.models.lm import LanguageModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CONFIGS = {
    "fla": GatedDeltaNetConfig(n_heads=3, head_dim=64, expand_v=2.0),
    "mamba-ssm": Mamba2Config(d_state=64, head_dim=64),
    "cudnn": AttentionConfig(n_heads=4),
    "flash": AttentionConfig(n_heads=4),
}
NORMED = AttentionConfig(n_heads=4, qk_norm=True)
each = pytest.mark.parametrize(
    ("library", "mixer"), [*CONFIGS.items(), pytest.param("flash", NORMED, id="flash-norm")]
)


def model(library, mixer):
    status = rival_libraries()[library]
    if not status.startswith("ready"):
        pytest.skip(f"{library}: {status}")
    return ModelConfig(dim=256, depth=2, mixer=mixer)


@each
def test_the_library_is_right_here(library, mixer):
    found = check(model(library, mixer), torch.device("cuda"), torch.bfloat16, library)
    assert found.ok and found.backends[0] != "torch", found


@each
@torch.no_grad()
def test_a_model_made_on_the_cpu_gives_the_same_logits_on_the_gpu(library, mixer):
    torch.manual_seed(0)
    net = LanguageModel(model(library, mixer)).eval()
    tokens = torch.randint(256, (2, 200))
    expected = net(tokens)
    net = net.cuda()
    net.set_backend(library)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = net(tokens.cuda())
    assert relative_error(logits.cpu(), expected) < 2e-2


@each
@torch.no_grad()
def test_a_prompt_in_pieces_and_single_steps_equal_the_whole(library, mixer):
    config = model(library, mixer)
    torch.manual_seed(0)
    net = build_mixer(config.dim, config.mixer).cuda()
    x = torch.randn(2, 150, config.dim, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        whole, _ = net(x)
        first, state = net(x[:, :70], return_state=True)
        second, state = net(x[:, 70:149], state, return_state=True)
        last, _ = net.step(x[:, 149], state)
    pieces = torch.cat([first, second, last.unsqueeze(1)], dim=1)
    assert relative_error(pieces, whole) < 1e-2


@pytest.mark.parametrize("library", ["fla", "mamba-ssm"])
def test_parameters_are_those_of_the_librarys_own_layer(library):
    config = model(library, CONFIGS[library])
    c = config.mixer
    if library == "fla":
        layers = pytest.importorskip("fla.layers")
        theirs = layers.GatedDeltaNet(config.dim, expand_v=c.expand_v, head_dim=c.head_dim, num_heads=c.n_heads)
    else:
        from mamba_ssm import Mamba2

        theirs = Mamba2(config.dim, d_state=c.d_state, headdim=c.head_dim)
    ours = build_mixer(config.dim, c).cuda()
    theirs.cuda().load_state_dict(ours.state_dict())
    x = torch.randn(2, 128, config.dim, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, expected = ours(x)[0], theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_error(y, expected) < 1e-2

"""The Transformer on the kernels that it has on a GPU: there, and on CPU tensors in Triton's interpreter.

Triton asks for its interpreter once, when it is imported: one test runs the others in a process of their own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e88.baselines import transformer
from e88.layers import common
from e88.models import lm
from e88.models.config import AttentionConfig, ModelConfig
from e88.models.lm import MLP, LanguageModel

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Names(TorchDispatchMode):
    """The operators that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.skipif(not INTERPRETED, reason="run in the interpreter, by the test below")
class TestTransformer:
    """A whole model on the kernels as on a GPU, which the interpreter runs on CPU tensors."""

    @pytest.fixture
    def net(self) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(ModelConfig(dim=24, depth=2, mixer=AttentionConfig(n_heads=3), mlp_hidden=20))

    @pytest.fixture
    def as_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def patch() -> None:
            for module in (transformer, lm, common):
                monkeypatch.setattr(module, "triton_serves", lambda x: True)

        return patch

    def gradients(self, nll: Callable[[Tensor], Tensor], net: LanguageModel, half: bool) -> list[Tensor]:
        windows = torch.arange(18).view(2, 9)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nll(windows).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

    @pytest.mark.parametrize("half", [False, True])
    def test_trains_alike(self, net: LanguageModel, as_on_a_gpu: Callable[[], None], half: bool) -> None:
        expected = self.gradients(net.nll, net, half)
        as_on_a_gpu()
        with Names() as names:
            found = self.gradients(net.nll, net, half)
        assert "aten::cat" not in names.seen and "aten::silu" not in names.seen
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == want.dtype and relative(got, want) < (3e-2 if half else 1e-5)

    @torch.no_grad()
    def test_a_prompt_in_pieces_equals_the_whole(self, net: LanguageModel, as_on_a_gpu: Callable[[], None]) -> None:
        tokens = torch.arange(18).view(2, 9)
        expected = net(tokens)
        as_on_a_gpu()
        first, state = net.prefill(tokens[:, :4])
        second, state = net.prefill(tokens[:, 4:7], state)
        third, state = net.step(tokens[:, 7], state)
        last, state = net.step(tokens[:, 8], state)
        for got, t in ((first, 3), (second, 6), (third, 7), (last, 8)):
            assert relative(got, expected[:, t]) < 1e-5

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
    def test_compiles_as_one_graph(self, net: LanguageModel, as_on_a_gpu: Callable[[], None]) -> None:
        as_on_a_gpu()
        torch.compiler.reset()
        expected = self.gradients(net.nll, net, False)
        found = self.gradients(torch.compile(net.nll, fullgraph=True, backend="aot_eager"), net, False)
        assert all(relative(got, want) < 1e-5 for got, want in zip(found, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter(passed_in_the_interpreter: Callable[[str], int]) -> None:
    assert passed_in_the_interpreter(__file__) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("start", "T"), [(0, 7), (5, 1), (5, 3)])
def test_layers_treat_dtypes_and_positions_as_on_a_cpu(start: int, T: int, autocast: bool) -> None:
    torch.manual_seed(0)
    qkv, mlp, x = torch.randn(2, T, 3, 3, 8), MLP(8, 20), torch.randn(2, T, 8)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        parts, y = transformer.split(qkv.cuda(), start, 500.0), mlp.cuda()(x.cuda())
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    for got, want in zip(parts, transformer.split(qkv, start, 500.0), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    want = mlp.cpu()(x)
    torch.testing.assert_close(y.cpu().float(), want, rtol=0, atol=0.02 if autocast else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_transformer_trains_on_a_gpu_as_in_float64(compile: bool) -> None:
    torch.manual_seed(0)
    net = LanguageModel(ModelConfig(dim=256, depth=2, mixer=AttentionConfig(n_heads=4), mlp_hidden=600))
    windows = torch.randint(256, (4, 130))
    exact = copy.deepcopy(net).double()
    expected = torch.autograd.grad(exact.nll(windows).mean(), list(exact.parameters()))
    net.cuda()
    nll = torch.compile(net.nll, fullgraph=True) if compile else net.nll
    with torch.autocast("cuda", torch.bfloat16):
        loss = nll(windows.cuda()).mean()
    for got, want in zip(torch.autograd.grad(loss, list(net.parameters())), expected, strict=True):
        assert relative(got.cpu(), want) < 5e-2

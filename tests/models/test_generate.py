import itertools

import pytest
import torch

from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.models.generate import Sampling, sample, stream
from e88.models.lm import LanguageModel


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=4, conv=4))
    m = LanguageModel(config).double()
    # Untrained logits are nearly equal; spread them so that sampling has something to choose.
    m.embedding.weight.data.mul_(50)
    return m


def take(iterator, n):
    return [token for token, _ in itertools.islice(iterator, n)]


def test_greedy_generation_equals_argmax_of_the_parallel_pass(model):
    prompt = list(b"hello")
    got = take(stream(model, prompt, sampling=Sampling(temperature=0)), 12)
    tokens = torch.tensor([prompt + got])
    want = model(tokens).argmax(-1)[0, len(prompt) - 1 : -1].tolist()
    assert got == want


def test_a_seed_decides_the_text_and_chunks_of_the_prompt_do_not(model):
    prompt = list(b"some longer prompt")
    one = take(stream(model, prompt, seed=1), 30)
    assert one == take(stream(model, prompt, seed=1, chunk=4), 30)
    assert one != take(stream(model, prompt, seed=2), 30)


def test_the_state_goes_on_where_generation_stopped(model):
    whole = take(stream(model, list(b"abc"), sampling=Sampling(temperature=0)), 20)
    pieces = list(itertools.islice(stream(model, list(b"abc"), sampling=Sampling(temperature=0)), 8))
    last, state = pieces[-1]
    rest = take(stream(model, [last], state=state, sampling=Sampling(temperature=0)), 12)
    assert [t for t, _ in pieces] + rest == whole


def test_the_state_does_not_grow(model):
    sizes = {sum(t.numel() for layer in s for t in layer.values()) for _, s in itertools.islice(stream(model, [1]), 30)}
    assert len(sizes) == 1


def test_top_k_and_top_p_keep_only_the_likeliest():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = probabilities.log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def kept(sampling):
        return set(sample(logits, sampling, generator).tolist())

    assert kept(Sampling()) == {0, 1, 2, 3}
    assert kept(Sampling(top_k=2)) == {0, 1}
    assert kept(Sampling(top_p=0.6)) == {0, 1}
    assert kept(Sampling(top_p=0.01)) == {0}
    assert kept(Sampling(temperature=0)) == {0}
    counts = torch.bincount(sample(logits, Sampling(temperature=1.0), generator), minlength=4) / 4000
    assert torch.allclose(counts, probabilities[0], atol=0.04)


def test_wrong_sampling_and_an_empty_prompt_are_refused(model):
    for options in ({"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError):
            Sampling(**options)
    with pytest.raises(UserError, match="prompt is empty"):
        next(stream(model, []))

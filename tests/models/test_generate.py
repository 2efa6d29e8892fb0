import copy
import warnings

import pytest
import torch

from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.models.generate import Decoder, Sampling, prepare, sample
from e88.models.lm import LanguageModel

GREEDY = Sampling(temperature=0)


def build(mixer=None, **options):
    torch.manual_seed(0)
    config = ModelConfig(dim=16, depth=2, mixer=mixer or E88Config(n_heads=2, n_state=4, conv=4), **options)
    m = LanguageModel(config).double()
    # Untrained logits are nearly equal; spread them so that sampling has something to choose.
    m.embedding.weight.data.mul_(50)
    return m


@pytest.fixture
def model():
    return build()


def decoder(model, prompt=(), **options):
    d = Decoder(model, **options)
    if prompt:
        d.read(torch.tensor([list(prompt)]))
    return d


def take(d, n):
    return [int(token) for token in d.tokens(n)]


MIXERS = [
    E88Config(n_heads=2, n_state=4, conv=4),
    E88Config(n_heads=2, n_state=4, gate=True, write_gate=True, head_norm=True, expand_v=2.0),
    E88Config(n_heads=3, n_state=4, gate=True, tie_kv=True, decay="constant"),
    E88Config(n_heads=2, n_state=4, decay="sigmoid", linear_state=True, write_gate=True),
    GatedDeltaNetConfig(n_heads=2, head_dim=8),
    Mamba2Config(d_state=8, head_dim=8),
    AttentionConfig(n_heads=2),
]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_greedy_generation_equals_argmax_of_the_parallel_pass(mixer, prepared):
    model = build(mixer, mlp_hidden=24 if isinstance(mixer, AttentionConfig) else 0)
    prompt = list(b"hello")
    given = prepare(copy.deepcopy(model), torch.float64) if prepared else model
    got = take(decoder(given, prompt, sampling=GREEDY), 12)
    want = model(torch.tensor([prompt + got])).argmax(-1)[0, len(prompt) - 1 : -1].tolist()
    assert got == want


def test_rows_side_by_side_are_what_each_is_alone(model):
    prompts = torch.tensor([list(b"first"), list(b"other")])
    d = Decoder(model, batch=2, sampling=GREEDY)
    d.read(prompts)
    together = torch.stack([token.clone() for token in d.tokens(9)])
    for row in range(2):
        assert together[:, row].tolist() == take(decoder(model, prompts[row].tolist(), sampling=GREEDY), 9)


def test_a_seed_decides_the_text_and_chunks_of_the_prompt_do_not(model):
    prompt = torch.tensor([list(b"some longer prompt")])

    def text(seed, chunk=1024):
        d = Decoder(model, seed=seed)
        d.read(prompt, chunk=chunk)
        return take(d, 30)

    one = text(1)
    assert one == text(1, chunk=4)
    assert one != text(2)


def test_tokens_come_alike_in_one_go_and_in_parts(model):
    whole, parts = decoder(model, b"abc"), decoder(model, b"abc")
    assert take(whole, 20) == take(parts, 3) + take(parts, 1) + take(parts, 16)


def test_the_state_goes_on_where_generation_stopped(model):
    whole = take(decoder(model, b"abc", sampling=GREEDY), 20)
    first = decoder(model, b"abc", sampling=GREEDY)
    pieces = take(first, 8)
    rest = take(decoder(model, pieces[-1:], state=first.state, sampling=GREEDY), 12)
    assert pieces + rest == whole


def test_a_prompt_after_tokens_goes_on_from_all_of_them(model):
    d, text = decoder(model, b"abc"), list(b"abc")
    for count, more in ((1, b"d"), (5, b"efg"), (0, b"hi"), (2, b"j")):
        text += [*take(d, count), *more]
        d.read(torch.tensor([list(more)]), chunk=2)
        torch.testing.assert_close(d.logits, model(torch.tensor([text]))[:, -1], rtol=1e-9, atol=1e-9)


def test_the_state_given_is_left_alone_and_taken_in_any_dtype(model):
    first = decoder(model, b"abc", sampling=GREEDY)
    take(first, 4)
    given = [{name: x.float() for name, x in part.items()} for part in first.state]
    kept = copy.deepcopy(given)
    second = decoder(model, b"d", state=given, sampling=GREEDY)
    take(second, 5)
    for part, before, reached in zip(given, kept, second.state, strict=True):
        for name, x in part.items():
            assert torch.equal(x, before[name]) and reached[name].dtype == torch.float64


def test_the_state_does_not_grow_nor_move(model):
    d = decoder(model, b"a")
    before = [x.data_ptr() for part in d.state for x in part.values()]
    take(d, 30)
    assert before == [x.data_ptr() for part in d.state for x in part.values()]


def test_decoding_in_bf16_is_near_and_keeps_what_must_stay_float32(model):
    model = model.float()
    half = prepare(copy.deepcopy(model), torch.bfloat16)
    names = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {n.rsplit(".", 1)[-1] for n in names if "conv" not in n and "norm" not in n} == {"A_log", "dt_bias"}
    ours, theirs = decoder(half, b"some text"), decoder(model, b"some text")
    for _ in range(6):
        theirs.token.copy_(ours.token)
        ours.advance()
        theirs.advance()
        assert (ours.logits - theirs.logits).norm() < 0.03 * theirs.logits.norm()
    assert all(x.dtype == torch.float32 for part in ours.state for x in part.values())


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
    assert kept(GREEDY) == {0}
    for sampling, want in [
        (Sampling(), probabilities[0]),
        (Sampling(temperature=2.0), probabilities[0].sqrt() / probabilities.sqrt().sum()),
        (Sampling(top_k=3), torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95),
        (Sampling(top_p=0.7), torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8),
    ]:
        counts = torch.bincount(sample(logits, sampling, generator), minlength=4) / 4000
        # Four standard deviations of a share of 4000 draws.
        assert torch.allclose(counts, want, atol=0.032), sampling


def test_wrong_sampling_and_an_empty_prompt_are_refused(model):
    for options in ({"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError):
            Sampling(**options)
    with pytest.raises(UserError, match="prompt is empty"):
        Decoder(model).read(torch.zeros(1, 0, dtype=torch.int64))


def on_gpu(mixer, batch=1, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=64, depth=3, mixer=mixer)).cuda()
    model.embedding.weight.data.mul_(50)
    return prepare(model, dtype)


GPU_MIXERS = [
    E88Config(n_heads=4, n_state=16),
    E88Config(n_heads=3, n_state=16, gate=True, conv=4, write_gate=True),
    GatedDeltaNetConfig(n_heads=2, head_dim=32),
    Mamba2Config(d_state=16, head_dim=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixer", GPU_MIXERS, ids=str)
def test_a_captured_step_is_the_eager_one(mixer, dtype, batch):
    model = on_gpu(mixer, dtype=dtype)
    prompt = torch.randint(256, (batch, 7))

    def run(graph):
        d = Decoder(model, batch=batch, sampling=Sampling(top_k=50, top_p=0.95), seed=3)
        d.reason = None if graph else "asked for"
        d.read(prompt)
        tokens = torch.stack([token.clone() for token in d.tokens(40)])
        return tokens, d.logits.clone(), d.state, d.reason

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "decoding runs without")
        captured, eager = run(True), run(False)
    assert captured[3] is None
    assert torch.equal(captured[0], eager[0])
    torch.testing.assert_close(captured[1], eager[1], rtol=0, atol=0)
    for ours, theirs in zip(captured[2], eager[2], strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_state_that_grows_is_decoded_eagerly_with_a_reason():
    d = Decoder(on_gpu(AttentionConfig(n_heads=2)), sampling=GREEDY)
    d.read(torch.tensor([[1, 2, 3]]))
    with pytest.warns(UserWarning, match="grows"):
        assert len(take(d, 5)) == 5
    assert d.state[0]["k"].shape[2] == 7


@pytest.mark.gpu
def test_a_state_moves_between_cpu_and_gpu():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=64, depth=3, mixer=GPU_MIXERS[1])).double()
    model.embedding.weight.data.mul_(50)
    whole = take(decoder(prepare(copy.deepcopy(model).float(), torch.float32), b"abc", sampling=GREEDY), 20)
    first = decoder(prepare(copy.deepcopy(model).float().cuda(), torch.float32), b"abc", sampling=GREEDY)
    pieces = take(first, 8)
    rest = take(decoder(model.float(), pieces[-1:], state=first.state, sampling=GREEDY), 12)
    assert pieces + rest == whole

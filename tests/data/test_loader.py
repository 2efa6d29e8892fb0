"""Batches are a pure function of seed and step; the held-out slice is fixed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.data.corpus import Split, open_corpus
from e88.data.loader import ROUNDS, WindowSampler, heldout_windows, shuffled
from e88.errors import UserError

SAMPLING = st.sampled_from(["passes", "draws"])


def split_of(size, dtype=np.uint8, seed=0):
    data = np.random.default_rng(seed).integers(0, 200, size).astype(dtype)
    return Split("train", data, bytes=size)


def philox(key, blocks):
    """Philox4x64-10 written out from the paper, counters from 1 on as numpy has them."""
    mask, out = (1 << 64) - 1, []
    for counter in range(1, blocks + 1):
        x, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [b >> 64 ^ x[1] ^ k0, b & mask, a >> 64 ^ x[3] ^ k1, a & mask]
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
        out += x
    return out


@given(
    size=st.integers(2, 400), window=st.integers(1, 60), batch=st.integers(1, 9), seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40), sampling=SAMPLING,
)  # fmt: skip
def test_batch_is_windows_of_the_split(size, window, batch, seed, step, sampling):
    split = split_of(max(size, window + 1))
    sampler = WindowSampler(split, window, batch, seed, sampling=sampling)
    starts, found = sampler.starts(step), sampler.batch(step)
    assert found.shape == (batch, window + 1) and found.dtype == np.int64
    for start, row in zip(starts, found, strict=True):
        assert 0 <= start <= len(split) - window - 1
        assert np.array_equal(row, split[start : start + window + 1])


@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**40), size=st.integers(65, 10**6))
@settings(max_examples=30)
def test_starts_are_those_of_the_published_generator(seed, step, size):
    split = Split("train", np.zeros(size, dtype=np.uint8), bytes=size)
    raw = philox((seed, step), 2)[:7]
    expected = [int((r >> 11) / 2**53 * (size - 64)) for r in raw]
    assert WindowSampler(split, 64, 7, seed, sampling="draws").starts(step).tolist() == expected


@given(seed=st.integers(0, 2**63), resume=st.integers(0, 30), sampling=SAMPLING)
@settings(max_examples=30)
def test_resumed_run_sees_the_batches_it_would_have_seen(seed, resume, sampling):
    split = split_of(1000)
    whole = WindowSampler(split, 16, 4, seed, sampling=sampling)
    batches = [whole.batch(step) for step in range(40)]
    resumed = WindowSampler(split, 16, 4, seed, sampling=sampling)
    for step in range(resume, 40):
        assert np.array_equal(resumed.batch(step), batches[step])
    assert np.array_equal(whole.batch(resume), batches[resume])


@pytest.mark.parametrize("sampling", ["passes", "draws"])
def test_seeds_and_steps_give_different_batches(sampling):
    samplers = [WindowSampler(split_of(100_000), 16, 8, seed, sampling=sampling) for seed in range(20)]
    assert len({tuple(sampler.starts(step)) for sampler in samplers for step in range(20)}) == 400


@given(
    window=st.integers(1, 20), carry=st.integers(1, 3), spare=st.integers(0, 500), batch=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1), first=st.integers(0, 3),
)  # fmt: skip
def test_a_pass_reads_all_of_the_text_once(window, carry, spare, batch, seed, first):
    split, span = split_of(carry * window + 1 + spare), carry * window
    sampler = WindowSampler(split, window, batch, seed, carry)
    # As many blocks as a pass has: all that fit, or one less where it is not cut at the beginning.
    count = max(1, (len(split) - span) // span)
    steps = range(first * count // batch * carry, ((first + 1) * count // batch + 1) * carry)
    rows = np.stack([sampler.starts(step) for step in steps]).reshape(-1, carry, batch).transpose(0, 2, 1)
    rows = rows.reshape(-1, carry)[first * count % batch :][:count]
    assert np.array_equal(rows, rows[:, :1] + window * np.arange(carry))
    starts = np.sort(rows[:, 0])
    assert len(starts) == count and (np.diff(starts) == span).all()
    # Less than a block at each end is left out.
    assert starts[0] < 2 * span and len(split) - 1 - (starts[-1] + span) < 2 * span
    assert starts[0] + len(split) - 1 - (starts[-1] + span) < 2 * span


def test_passes_differ_in_their_order_and_where_they_are_cut():
    sampler = WindowSampler(split_of(64 * 101 + 1), 64, 100, seed=3)
    starts = np.stack([sampler.starts(turn) for turn in range(200)])
    offsets = starts.min(1)
    assert len(set(offsets.tolist())) > 50 and offsets.max() <= 64
    ranks = (starts - offsets[:, None]) // 64
    # Where a window comes in a pass says nothing of where it comes in the next, nor of where its neighbours come.
    places = np.argsort(ranks, axis=1)
    centred = places - places.mean()
    for a, b in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs((a * b).mean() / centred.var()) < 4 / np.sqrt(a.size)


@given(count=st.one_of(st.integers(1, 600), st.sampled_from([1024, 4096, 4097])), seed=st.integers(0, 2**32))
def test_shuffled_is_an_order_of_all_places(count, seed):
    keys = np.random.default_rng(seed).random(ROUNDS).tolist()
    assert np.array_equal(np.sort(shuffled(np.arange(count), count, keys)), np.arange(count))


def test_every_order_of_a_few_places_is_as_likely():
    rng = np.random.default_rng(0)
    orders = [tuple(shuffled(np.arange(4), 4, rng.random(ROUNDS).tolist())) for _ in range(4800)]
    counts = np.array(list(Counter(orders).values()))
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: mean 23, standard deviation 7.
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 4 * 7


def test_drawn_starts_are_uniform_and_uncorrelated():
    sampler = WindowSampler(split_of(1064), 64, 100, seed=1, sampling="draws")
    starts = np.stack([sampler.starts(step) for step in range(1000)])
    counts = np.bincount(starts.ravel(), minlength=1000)
    assert counts.shape == (1000,)
    # Chi-square with 999 degrees of freedom: mean 999, standard deviation 45.
    assert abs(((counts - 100) ** 2 / 100).sum() - 999) < 4 * 45
    centred = starts - starts.mean()
    for a, b in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs((a * b).mean() / centred.var()) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_all_token_types_and_memory_maps(tmp_path, dtype):
    split = split_of(500, dtype)
    split.data.tofile(tmp_path / "x.bin")
    mapped = Split("train", np.memmap(tmp_path / "x.bin", dtype=dtype, mode="r"), bytes=500)
    for step in range(5):
        batch = WindowSampler(mapped, 20, 3, 7).batch(step)
        assert type(batch) is np.ndarray and batch.flags.owndata
        assert np.array_equal(batch, WindowSampler(split, 20, 3, 7).batch(step))


@given(size=st.integers(2, 3000), window=st.integers(1, 100), max_bytes=st.integers(1, 4000))
def test_heldout_windows_are_fixed_spread_and_do_not_overlap(size, window, max_bytes):
    size = max(size, window + 1)
    split = Split("valid", np.arange(size, dtype=np.uint32), bytes=size)
    found, scored = heldout_windows(split, window, max_bytes)
    assert found.dtype == np.int64 and np.array_equal(found, heldout_windows(split, window, max_bytes).rows)
    assert scored.all() and scored.shape == (len(found), window)
    starts = found[:, 0]
    assert np.array_equal(found, starts[:, None] + np.arange(window + 1))
    fits = size // (window + 1)
    assert len(found) == max(1, min(max_bytes // window, fits))
    if len(found) > 1:
        gaps = np.diff(starts)
        assert gaps.min() >= window + 1 and gaps.max() - gaps.min() <= 1
        assert starts[0] == 0 and starts[-1] == size - window - 1


def test_heldout_slice_is_measured_in_bytes_of_text():
    split = Split("valid", np.zeros(100_000, dtype=np.uint16), bytes=400_000)
    assert len(heldout_windows(split, 100, max_bytes=40_000).rows) == 100


@given(
    spare=st.integers(0, 2000), window=st.integers(1, 60), max_bytes=st.integers(1, 2000), context=st.integers(1, 300)
)
def test_context_decides_nothing_of_what_is_scored(spare, window, max_bytes, context):
    size = context + window + 1 + spare
    split = Split("valid", np.arange(size, dtype=np.uint32), bytes=size)
    plain = heldout_windows(split, window, max_bytes)
    rows, scored = heldout_windows(split, window, max_bytes, context)
    assert rows.shape == (len(plain.rows), context + window + 1) and (np.diff(rows) == 1).all()
    assert np.array_equal(rows[:, 1:][scored].reshape(-1, window), plain.rows[:, 1:])
    # All the context that there is, up to what is asked for.
    assert np.array_equal(scored.argmax(1), np.minimum(plain.rows[:, 0], context))


@given(
    window=st.integers(1, 30), carry=st.integers(1, 6), spare=st.integers(0, 200), seed=st.integers(0, 2**64 - 1),
    block=st.integers(0, 2**30), sampling=SAMPLING,
)  # fmt: skip
def test_windows_of_a_block_follow_one_another(window, carry, spare, seed, block, sampling):
    split = split_of(carry * window + 1 + spare)
    sampler = WindowSampler(split, window, 3, seed, carry, sampling)
    batches = [sampler.batch(block * carry + turn) for turn in range(carry)]
    whole = np.concatenate([batches[0][:, :1], *(batch[:, 1:] for batch in batches)], axis=1)
    # Where a window as long as the block would be.
    assert np.array_equal(whole, WindowSampler(split, carry * window, 3, seed, 1, sampling).batch(block))
    assert all(np.array_equal(a[:, -1], b[:, 0]) for a, b in zip(batches[:-1], batches[1:], strict=True))


def test_split_shorter_than_a_window_is_refused(tmp_path):
    message = r"the train split has 64 bytes, too few for a window of 64 \+ 1; use a shorter window or more data"
    with pytest.raises(UserError, match=message):
        WindowSampler(split_of(64), 64, 1, 0)
    with pytest.raises(UserError, match="has 5 tokens"):
        heldout_windows(split_of(5, np.uint16), 8)
    with pytest.raises(UserError, match=r"has 64 bytes, too few for 4 windows in a row, together of 64 \+ 1"):
        WindowSampler(split_of(64), 16, 1, 0, carry=4)
    with pytest.raises(UserError, match=r"has 64 bytes, too few for a window with its context of 64 \+ 1"):
        heldout_windows(split_of(64), 16, context=48)
    path = tmp_path / "small.txt"
    path.write_text("some text\n" * 20)
    with pytest.raises(UserError, match="the valid split has 10 bytes"):
        heldout_windows(open_corpus(path, cache=tmp_path / "cache").valid, 64)


@pytest.mark.parametrize(("window", "batch", "seed"), [(0, 1, 0), (4, 0, 0), (4, 1, -1), (4, 1, 2**64)])
def test_sampler_refuses_senseless_arguments(window, batch, seed):
    with pytest.raises(UserError, match="must be"):
        WindowSampler(split_of(100), window, batch, seed)

"""Tokens drawn on the device follow their parameters, and nobody else's."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from blitzjax.engine.sampling import (
    Draws, describe, described, edit, edits_until, greedy_draws, keep, keep_few, likeliest, masses, no_edits, sample, token_logprob,
)
from blitzjax.types import MAX_LOGPROBS, LogitBias, ModelSpec, Sampling

VOCAB = 1000
SPEC = ModelSpec("m", "llama", 1, 8, 1, 1, 8, 8, VOCAB, 64, 1e4, 1e-5, True, "float32", eos_token_ids=(7, 9))
DRAW_EDITED = jax.jit(lambda x, draws: described(x, sample(edit(x, draws.edits), draws), draws.edits.logprobs))
HISTORY = np.array([5, 5, 6, 990, 6, 5, 3, 3, 3, 11], np.int32)


def draw(logits: np.ndarray, rows: list[tuple[Sampling, int]]) -> np.ndarray:
    draws = greedy_draws(len(rows))
    for i, (sampling, step) in enumerate(rows):
        draws.set(i, sampling, step)
    return np.asarray(jax.jit(sample)(logits, draws))


def logits_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def test_temperature_zero_takes_the_largest() -> None:
    logits = logits_of(4)
    assert (draw(logits, [(Sampling(), 0)] * 4) == logits.argmax(-1)).all()


def test_a_row_ignores_its_neighbours() -> None:
    logits = logits_of(8)
    rows = [(Sampling(temperature=0.8, top_k=40 if i % 2 else 0, top_p=0.9, seed=i << 33 | i), i) for i in range(8)]
    together = draw(logits, rows)
    alone = [draw(np.stack([logits[i], logits[0]]), [rows[i], (Sampling(temperature=2.0, seed=9), 5)])[0] for i in range(8)]
    assert together.tolist() == alone


def test_a_row_of_few_allowed_tokens_ignores_a_filter_beside_it() -> None:
    logits = logits_of(200)
    logits[:, 60:] = -np.inf
    alone = [(Sampling(temperature=1.0, seed=s), s) for s in range(100)]
    beside = [(Sampling(temperature=1.0, top_p=0.9, seed=s), s) for s in range(100)]
    assert (draw(logits, alone + beside)[:100] == draw(logits[:100], alone)).all()


def test_same_seed_and_step_draw_the_same_and_others_do_not() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    tokens = {(seed, step): int(draw(logits, [(Sampling(temperature=1.0, seed=seed), step)])[0])
              for seed in (1, 2, 2 + (1 << 32), -2, -(1 << 63)) for step in range(4)}
    assert len(set(tokens.values())) > 15
    assert int(draw(logits, [(Sampling(temperature=1.0, seed=2), 3)])[0]) == tokens[2, 3]


@pytest.mark.parametrize("k", [1, 5, 300])
def test_top_k_keeps_exactly_k(k: int) -> None:
    logits = logits_of(1)
    allowed = set(np.argsort(-logits[0])[:k].tolist())
    seen = {int(draw(logits, [(Sampling(temperature=5.0, top_k=k, seed=s), 0)])[0]) for s in range(200)}
    assert seen <= allowed and (k == 1 or len(seen) > min(k, 100) // 2)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_top_p_keeps_the_smallest_set_of_that_mass(p: float) -> None:
    logits = logits_of(1)
    order = np.argsort(-logits[0])
    mass = np.cumsum(np.exp(logits[0][order]) / np.exp(logits[0]).sum())
    allowed = set(order[: int(np.searchsorted(mass, p)) + 1].tolist())
    seen = {int(draw(logits, [(Sampling(temperature=1.0, top_p=p, seed=s), 0)])[0]) for s in range(200)}
    assert seen <= allowed


@pytest.mark.parametrize("tokens", [(0, 1, 2, 3), (5, 21, 37, 999), (998, 500, 64, 63)])
def test_frequencies_follow_the_softmax(tokens: tuple[int, ...]) -> None:
    """Whichever tokens are drawn as one group."""
    wanted = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.full((1, VOCAB), np.log(1e-9), np.float32)
    logits[0, list(tokens)] = np.log(wanted)
    rows = [(Sampling(temperature=1.0, seed=s), 0) for s in range(4000)]
    counts = np.bincount(draw(np.repeat(logits, 4000, 0), rows), minlength=VOCAB)[list(tokens)] / 4000
    assert np.abs(counts - wanted).max() < 0.03


@pytest.mark.parametrize("vocab", [49152, 32003])
def test_what_groups_weigh_does_not_depend_on_other_rows(vocab: int) -> None:
    """To the last bit: else a seed would give another answer in another batch, once in a long while."""
    logits = np.random.default_rng(1).normal(0, 4, (16, vocab)).astype(np.float32)
    weigh = jax.jit(lambda x: masses(x, x.max(-1, keepdims=True)))
    alone = np.concatenate([weigh(logits[row : row + 1]) for row in range(16)])
    exact = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    assert np.abs(alone.sum(-1) / exact.sum(-1) - 1).max() < 1e-5
    for rows in (2, 4, 5, 8, 16):
        assert np.asarray(weigh(logits[:rows])).tobytes() == alone[:rows].tobytes()


def test_of_equal_logits_the_first_is_taken() -> None:
    logits = logits_of(3)
    for row, ties in enumerate(((3, 4, 700), (130, 129, 500), (999, 64))):
        logits[row, list(ties)] = 50.0
    assert draw(logits, [(Sampling(), 0)] * 3).tolist() == [3, 129, 64]


# ---- each transform against NumPy -----------------------------------------------------------------------------------


def edited_logits(logits: np.ndarray, rows: list[Sampling], step: int) -> np.ndarray:
    """Every row has HISTORY, its last `step` tokens being the answer."""
    edits = no_edits(len(rows), SPEC, 16)
    for i, sampling in enumerate(rows):
        edits.set(i, sampling, step, HISTORY, SPEC.eos_token_ids)
    return np.asarray(jax.jit(edit)(logits, edits))


def reference_edit(logits: np.ndarray, s: Sampling, step: int) -> np.ndarray:
    out = logits.astype(np.float64)
    if step < s.min_tokens:
        out[[*s.stop_token_ids, *SPEC.eos_token_ids]] = -np.inf
    for b in s.logit_bias:
        out[b.token_id] += b.bias
    for token in set(HISTORY.tolist()):
        out[token] *= 1 / s.repetition_penalty if out[token] > 0 else s.repetition_penalty
    for token in HISTORY[len(HISTORY) - step:]:
        out[token] -= s.frequency_penalty
    for token in set(HISTORY[len(HISTORY) - step:].tolist()):
        out[token] -= s.presence_penalty
    return out


EDITS = [
    Sampling(repetition_penalty=1.3), Sampling(repetition_penalty=0.5), Sampling(presence_penalty=0.7),
    Sampling(frequency_penalty=-0.4), Sampling(repetition_penalty=2.0, presence_penalty=-1.0, frequency_penalty=1.5),
    Sampling(logit_bias=(LogitBias(5, -100.0), LogitBias(999, 4.5), LogitBias(0, 1.0))),
    Sampling(logit_bias=(LogitBias(5, 2.0),), repetition_penalty=1.5, frequency_penalty=0.25),
    Sampling(min_tokens=9, stop_token_ids=(1, 5)), Sampling(min_tokens=9, stop_token_ids=(1,), ignore_eos=True),
    Sampling(min_tokens=4), Sampling(),
]


@pytest.mark.parametrize("step", [0, 4, len(HISTORY)])
def test_edited_logits_are_the_definition(step: int) -> None:
    logits = logits_of(len(EDITS), seed=step)
    got = edited_logits(logits, EDITS, step)
    for row, sampling in enumerate(EDITS):
        expected = reference_edit(logits[row], sampling, step)
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, err_msg=str(sampling))
        assert step < edits_until(sampling) or np.array_equal(got[row], logits[row]), sampling


def reference_keep(x: np.ndarray, s: Sampling) -> set[int]:
    """Ids that stay, by sorting."""
    ids = [i for i in np.argsort(-x, kind="stable") if np.exp(x[i] - x.max()) >= s.min_p]
    ids = ids[: s.top_k or None]
    p = np.exp(x[ids].astype(np.float64) - x.max())
    before = np.cumsum(p) - p
    return {int(i) for i, mass in zip(ids, before / p.sum(), strict=True) if mass < s.top_p}


FILTERS = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
           for t in (0.7, 2.0) for k in (0, 1, 30, 64, 200, 300) for p in (1.0, 0.6) for m in (0.0, 0.05, 1.0)]


def scaled_logits(rows: list[Sampling]) -> np.ndarray:
    return logits_of(len(rows)) / np.array([[s.temperature] for s in rows], np.float32)


def draws_of(rows: list[Sampling]) -> Draws:
    draws = greedy_draws(len(rows))
    for row, sampling in enumerate(rows):
        draws.set(row, sampling, 0)
    return draws


@pytest.mark.parametrize("most", [256, VOCAB])
def test_kept_tokens_are_the_definition(most: int) -> None:
    """Top-p is left to the draw."""
    rows = [s for s in FILTERS if s.top_k <= most]
    scaled = scaled_logits(rows)
    got = np.asarray(jax.jit(keep)(scaled, draws_of(rows)))
    for row, sampling in enumerate(rows):
        kept = np.flatnonzero(got[row] > -np.inf)
        assert set(kept.tolist()) == reference_keep(scaled[row], replace(sampling, top_p=1.0)), sampling
        assert (got[row][kept] == scaled[row][kept]).all()


def test_few_kept_tokens_are_the_definition() -> None:
    rows = [s for s in FILTERS if 0 < s.top_k <= 64]
    scaled = scaled_logits(rows)
    ids, x, whole = map(np.asarray, jax.jit(keep_few)(scaled, draws_of(rows)))
    assert whole.all()
    for row, sampling in enumerate(rows):
        kept = ids[row][x[row] > -np.inf]
        assert set(kept.tolist()) == reference_keep(scaled[row], sampling), sampling
        assert (x[row][x[row] > -np.inf] == scaled[row][kept]).all()


def test_tokens_as_likely_as_the_last_that_top_k_keeps_are_kept_too() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, 100:103], logits[0, 500:505] = 3.0, 2.0  # row 1: all are
    rows = [Sampling(temperature=1.0, top_k=4)] * 2
    ids, x, whole = map(np.asarray, jax.jit(keep_few)(logits, draws_of(rows)))
    assert whole.tolist() == [True, False]
    assert sorted(ids[0][x[0] > -np.inf].tolist()) == [100, 101, 102, 500, 501, 502, 503, 504]
    assert len({int(draw(logits[1:], [(replace(rows[1], seed=s), 0)])[0]) for s in range(100)}) > 80


def test_the_likeliest_are_those_of_a_sort() -> None:
    x = np.random.default_rng(2).integers(0, 40, (6, 5003)).astype(np.float32)  # many are equal
    x[5] = -np.inf
    for count in (1, 20, 72, 300):
        largest, ids = map(np.asarray, jax.jit(likeliest, static_argnums=1)(x, count))
        expected = np.argsort(-x, axis=-1, kind="stable")[:, :count]
        assert np.array_equal(ids, expected) and np.array_equal(largest, np.take_along_axis(x, expected, 1))


@pytest.mark.parametrize("filters", [
    Sampling(top_p=0.9), Sampling(top_p=0.3), Sampling(top_p=0.02), Sampling(top_p=0.5, min_p=0.05), Sampling(min_p=0.2),
    Sampling(top_k=8), Sampling(top_k=20, top_p=0.6), Sampling(top_k=100, top_p=0.5), Sampling(top_k=70, min_p=0.1)])
def test_frequencies_follow_what_filters_keep(filters: Sampling) -> None:
    logits, tries = logits_of(1, seed=4), 6000
    sampling = replace(filters, temperature=1.5)
    kept = sorted(reference_keep(logits[0] / np.float32(1.5), sampling))
    wanted = np.exp(logits[0, kept].astype(np.float64) / 1.5)
    wanted *= tries / wanted.sum()
    drawn = draw(np.repeat(logits, tries, 0), [(replace(sampling, seed=s), 0) for s in range(tries)])
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[kept].sum() == tries
    many = [i for i, n in enumerate(wanted) if n >= 5]
    chi2 = (np.square(counts[kept] - wanted) / wanted)[many].sum()
    assert many and chi2 < len(many) + 4 * np.sqrt(2 * len(many))


@pytest.mark.parametrize("p", [1e-30, 1e-40])
def test_the_least_top_p_keeps_the_likeliest(p: float) -> None:
    """XLA:CPU takes the second one for 0."""
    logits = logits_of(2)
    assert draw(logits, [(Sampling(temperature=2.0, top_p=p), 0)] * 2).tolist() == logits.argmax(-1).tolist()


def test_logits_that_are_no_numbers_end_in_a_token() -> None:
    logits = np.full((2, VOCAB), np.nan, np.float32)
    logits[1] = -np.inf
    for filters in (Sampling(top_p=0.5), Sampling(top_k=3, top_p=0.5), Sampling(top_k=300, min_p=0.1)):
        assert (draw(logits, [(replace(filters, temperature=1.0), 0)] * 2) < VOCAB).all()


def test_logprobs_are_those_of_the_logits_as_they_came() -> None:
    logits, tokens = logits_of(3), np.array([0, 500, 999], np.int32)
    logits[2, 999] = 50.0
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for row, packed in enumerate(np.asarray(jax.jit(describe)(logits, tokens))):
        got = token_logprob(packed, 5)
        order = np.argsort(-logits[row], kind="stable")
        assert packed[0] == tokens[row] and got.rank == 1 + order.tolist().index(tokens[row])
        np.testing.assert_allclose(got.logprob, expected[row, tokens[row]], rtol=1e-5, atol=1e-6)
        assert got.top_ids == tuple(order[:5])
        np.testing.assert_allclose(got.top_logprobs, expected[row, order[:5]], rtol=1e-5, atol=1e-6)
        assert [len(token_logprob(packed, n).top_ids) for n in (0, MAX_LOGPROBS)] == [0, MAX_LOGPROBS]


def test_edits_of_one_row_change_no_other_and_reach_greedy_rows() -> None:
    logits = logits_of(4)
    best, drawn = logits.argmax(-1), Sampling(temperature=0.9, seed=3)
    draws = greedy_draws(4)._replace(edits=no_edits(4, SPEC, 16))
    rows = [Sampling(logit_bias=(LogitBias(int(best[0]), -100.0),)), Sampling(), drawn, Sampling(logprobs=2)]
    for i, sampling in enumerate(rows):
        draws.set(i, sampling, 2)
        draws.edits.set(i, sampling, 2, HISTORY, ())
    packed = np.asarray(DRAW_EDITED(logits, draws))
    alone = [draw(logits[i:i + 1], [(rows[i], 2)])[0] for i in range(4)]
    assert packed[0, 0] == np.argsort(-logits[0])[1] and packed[1:, 0].tolist() == alone[1:]
    assert token_logprob(packed[3], 2).top_ids[0] == best[3]


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=1.5), Sampling(temperature=1.5, top_k=40), Sampling(temperature=1.5, top_p=0.8, min_p=1e-3),
    Sampling(), Sampling(repetition_penalty=1.3, logit_bias=(LogitBias(5, 50.0),))])
def test_a_grammar_leaves_the_allowed_tokens_as_they_are_and_no_others(sampling: Sampling) -> None:
    allowed, logits, bits = [3, 31, 32, 500, 999], logits_of(4), np.zeros(1024, np.uint8)
    bits[allowed] = 1
    masked, free = (greedy_draws(4)._replace(edits=no_edits(4, SPEC, 16)) for _ in range(2))
    for row in range(4):
        for drawn, mask in ((masked, np.packbits(bits, bitorder="little").view(np.uint32)), (free, None)):
            drawn.set(row, replace(sampling, seed=row), 2)
            drawn.edits.set(row, sampling, 2, HISTORY, (), mask if row else None)
    only = np.full_like(logits, -np.inf)
    only[:, allowed] = logits[:, allowed]
    got, left, unmasked = (np.asarray(DRAW_EDITED(*args))[:, 0] for args in ((logits, masked), (only, free), (logits, free)))
    assert got.tolist() == [unmasked[0], *left[1:]] and set(got[1:].tolist()) <= set(allowed)

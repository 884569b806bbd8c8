"""Tokens drawn on the device follow their parameters, and nobody else's."""

import jax
import numpy as np
import pytest

from blitzjax.engine.sampling import greedy_draws, sample
from blitzjax.types import Sampling

VOCAB = 1000


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


def test_same_seed_and_step_draw_the_same_and_others_do_not() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    tokens = {(seed, step): int(draw(logits, [(Sampling(temperature=1.0, seed=seed), step)])[0])
              for seed in (1, 2, 2 + (1 << 32)) for step in range(4)}
    assert len(set(tokens.values())) > 9
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


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * (VOCAB - 4)], np.float32))
    rows = [(Sampling(temperature=1.0, seed=s), 0) for s in range(4000)]
    counts = np.bincount(draw(np.repeat(logits, 4000, 0), rows), minlength=4)[:4] / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03

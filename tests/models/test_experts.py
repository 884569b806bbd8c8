"""Experts: every token gets what its own experts make of it, however tokens crowd on one of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blitzjax.models.experts import Experts
from blitzjax.types import ModelSpec

COUNT, CHOSEN, DIM, INNER = 5, 2, 16, 12
OPTIONS = (("expert_dim", INNER), ("experts", COUNT), ("experts_per_token", CHOSEN))


def build(dtype: str) -> Experts:
    return Experts(ModelSpec("m", "mixtral", 1, DIM, 1, 1, DIM, INNER, 8, 8, 1e4, 1e-5, False, dtype, options=OPTIONS),
                   nnx.Rngs(3))


def one_by_one(experts: Experts, x: np.ndarray) -> np.ndarray:
    """The same in NumPy, token after token."""
    router, gate_up, down = (np.asarray(p[...], np.float32) for p in (experts.router, experts.gate_up, experts.down))
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        logits = router @ row
        chosen = np.argsort(-logits)[:CHOSEN]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = np.moveaxis(gate_up[expert] @ row, 1, 0)
            out[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("tokens", [1, 6, 150])
@pytest.mark.parametrize("crowd", [False, True], ids=["spread", "crowded"])
def test_each_token_gets_its_experts(tokens: int, crowd: bool, dtype: str, tolerance: float) -> None:
    experts, x = build(dtype), np.random.default_rng(tokens).standard_normal((tokens, DIM), np.float32)
    if crowd:  # all tokens on the same two experts
        x = x[:1] + 1e-3 * x
    graph, state = nnx.split(experts)
    out = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.asarray(x)[None])[0]
    expected = one_by_one(experts, x)
    assert np.linalg.norm(out - expected) < tolerance * np.linalg.norm(expected)

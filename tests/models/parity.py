"""A tiny checkpoint behind the compiled stages, beside what transformers computed from it (tests/reference)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np

from blitzjax.engine import modules
from blitzjax.engine.params import LayerStore
from blitzjax.engine.runner import Prefill, Runner


@dataclass(frozen=True)
class Model:
    """A checkpoint on devices, and what transformers made of it."""

    runner: Runner
    expected: dict[str, np.ndarray]

    def prefill(self, tokens: np.ndarray) -> Prefill:
        return self.runner.begin(tokens.tolist())

    def logits(self, x: jax.Array) -> np.ndarray:
        """f32[N, D] → f32[N, V]"""
        store = self.runner.store
        table = store.params(store.spec.embed_unit)["table"] if store.spec.tied_embeddings else None
        return np.asarray(_head(store)(store.params(store.spec.head_unit), x, table))


@functools.cache
def _head(store: LayerStore):
    return jax.jit(lambda weights, x, table: modules.bind(store.spec, "head")(weights)(x, table))


def assert_close(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert actual.shape == wanted.shape
    assert np.linalg.norm(actual - wanted) < 2e-4 * np.linalg.norm(wanted)


def residual(prefill: Prefill) -> np.ndarray:
    """f32[prompt, D] of all chunks."""
    return np.concatenate([np.asarray(x)[0, :c.stop - c.start] for c, x in zip(prefill.chunks, prefill.x, strict=True)])

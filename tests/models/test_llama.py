"""Parity with transformers, piece by piece, on a random two-layer llama (tests/reference/README.md)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding
import tiny_llama as tiny

from blitzjax.engine.params import LayerStore, fill, unit_kind
from blitzjax.errors import CheckpointError
from blitzjax.models import family
from blitzjax.types import ModelSpec

REFERENCE = Path(__file__).parents[1] / "reference"

SPEC = ModelSpec(name="tiny", family="llama", layers=tiny.LAYERS, dim=tiny.DIM, heads=tiny.HEADS,
                 kv_heads=tiny.KV_HEADS, head_dim=tiny.HEAD_DIM, ffn_dim=tiny.FFN, vocab=tiny.VOCAB, max_len=64,
                 rope_theta=tiny.ROPE_THETA, norm_eps=tiny.NORM_EPS, tied_embeddings=False, dtype="float32")


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda tp: f"tp{tp}")
def store(request: pytest.FixtureRequest) -> LayerStore:
    loaded = LayerStore(SPEC, jax.devices()[:request.param])
    weights = tiny.weights()
    for unit in range(SPEC.units):
        kind = unit_kind(SPEC, unit)
        prefix = f"model.layers.{unit}." if kind == "layer" else ""
        published = {name: weights[prefix + name] for name in family("llama").tensors(SPEC, kind)}
        fill(loaded, unit, family("llama").fuse(SPEC, kind, published))
        loaded.commit(unit)
    return loaded


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "tiny.npz") as file:
        return dict(file)


def assert_close(actual: jax.Array, wanted: np.ndarray) -> None:
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=2e-4, atol=2e-5)


def test_embedding_matches_reference(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    assert_close(decoding.embed(store, expected["tokens"]), expected["embed"])


def test_one_layer_matches_reference(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    assert_close(decoding.layers(store, jnp.asarray(expected["embed"]), stop=1), expected["layer_0"])


def test_all_layers_match_reference(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    assert_close(decoding.layers(store, jnp.asarray(expected["embed"]), stop=SPEC.layers), expected["layers"])


def test_head_matches_reference(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    logits = decoding.head(store, jnp.asarray(expected["layers"]).reshape(-1, SPEC.dim))
    assert_close(logits.reshape(expected["logits"].shape), expected["logits"])


def test_whole_model_matches_reference(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    x = decoding.layers(store, decoding.embed(store, expected["tokens"]), SPEC.layers)
    logits = decoding.head(store, x.reshape(-1, SPEC.dim))
    assert_close(logits.reshape(expected["logits"].shape), expected["logits"])


def test_unknown_family_lists_the_supported_ones() -> None:
    with pytest.raises(CheckpointError, match="mamba.*supported: gemma, .*llama, .*qwen3_moe; .*own Flax model"):
        family("mamba")

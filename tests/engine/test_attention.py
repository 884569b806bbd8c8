"""Attention through jax.nn.dot_product_attention is the plain one's; which devices get which follows from their names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blitzjax.config import EngineConfig
from blitzjax.engine.attention import Attention, chosen, fused
from blitzjax.engine.stages import Stages
from blitzjax.errors import ConfigError
from blitzjax.models.blocks import Scoring
from blitzjax.types import ModelSpec

SPEC = ModelSpec("tiny", "llama", 5, 64, 4, 2, 16, 128, 272, 512, 10000.0, 1e-5, True, "bfloat16")
SHAPES = {"groups": (6, 2, 24), "one": (4, 1, 8)}  # query heads, KV heads, head_dim
SCORINGS = {"plain": Scoring(), "window": Scoring(scale=0.3, window=5), "all": Scoring(0.2, window=7, softcap=3.0)}
PLAIN = Attention()
SHORT = chosen(SPEC, EngineConfig(native_kernels=False), jax.devices("cpu")[:1], Path())
LENGTH, START = 48, 20  # of the cache; where the later chunk begins


def drawn(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def first(way: Attention, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
    return way.first(q, *way.layout.kept(k, v), scoring)


def later(way: Attention, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
    """The queries are those of the last tokens; their keys come over what was in their place before."""
    tokens = q.shape[1]
    kept = way.layout.fitted(way.layout.kept(k.at[:, START:].set(9.0), v.at[:, START:].set(9.0)), LENGTH)
    new = k[:, START : START + tokens], v[:, START : START + tokens]
    return way.later(q, *way.layout.written(kept, new, START), START, scoring)


def step(way: Attention, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
    """Rows are as long as `at` says; behind that lies what nobody may read."""
    at = jnp.arange(q.shape[0], dtype=jnp.int32) * 7
    kept = way.layout.fitted(way.layout.kept(k, v), LENGTH)
    new = k[:, :1] * 0.5, v[:, :1] * 0.5
    return way.step(q[:, :1], *way.layout.appended(kept, new, at), at, scoring)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("call", [first, later, step])
def test_dot_product_attention_is_two_products(call, scoring: str, shape: str) -> None:
    (heads, kv, hd), rows, tokens = SHAPES[shape], 4, 16
    q = drawn(rows, tokens, heads, hd, seed=1)
    k, v = (drawn(rows, tokens if call is first else START + tokens, kv, hd, seed=seed) for seed in (2, 3))
    want, got = (jax.jit(call, static_argnums=(0, 4))(way, q, k, v, SCORINGS[scoring])
                 for way in (PLAIN, fused("xla", "float32")))
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


def has_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


@pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(8, 2, 64), (32, 8, 128)])
@pytest.mark.parametrize("scoring", ["plain", "window"])
@pytest.mark.parametrize("call", [first, later, step])
def test_cudnn_computes_what_two_products_do(call, scoring: str, shape: tuple[int, int, int]) -> None:
    (heads, kv, hd), rows, tokens = shape, 1 if call is later else 4, 16
    q = drawn(rows, tokens, heads, hd, seed=1)
    k, v = (drawn(rows, tokens if call is first else START + tokens, kv, hd, seed=seed) for seed in (2, 3))
    want, got = (jax.jit(call, static_argnums=(0, 4))(way, q, k, v, SCORINGS[scoring])
                 for way in (PLAIN, fused("cudnn", "bfloat16")))
    np.testing.assert_allclose(got, want, atol=3e-2, rtol=3e-2)


def test_what_cudnn_does_not_take_is_an_error_that_names_the_knob(tmp_path: Path) -> None:
    """Here there is none at all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("tp",))
    stages = Stages(SPEC, EngineConfig(executable_cache=str(tmp_path)), mesh, fused("cudnn", "bfloat16"))
    with pytest.raises(ConfigError, match=r"first-layer-32-256 of tiny.*engine\.cudnn_attention=false"):
        stages.compile_all()


def test_sinks_go_through_the_products() -> None:
    q, k, v = (drawn(2, 8, heads, 16, seed=heads) for heads in (4, 2, 2))
    scoring = Scoring(sinks=drawn(2, 2, seed=9))
    want, got = (first(way, q, k, v, scoring) for way in (PLAIN, fused("xla", "float32")))
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("way", [PLAIN, SHORT, fused("xla", "bfloat16")], ids=["plain", "short", "fused"])
def test_layouts_keep_cut_and_pad(way: Attention) -> None:
    layout, (k, v) = way.layout, (drawn(3, 10, 2, 16, seed=s) for s in (4, 5))
    kept = layout.kept(k, v)
    assert tuple(a.shape for a in kept) == layout.shapes(SPEC, 3, 10) and kept[0].dtype == layout.dtype
    again = layout.fitted(layout.fitted(kept, 24), 10)
    assert layout.tokens(layout.fitted(kept, 24)) == 24
    for a, b in zip(kept, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(layout.fitted(kept, 6), layout.kept(k[:, :6], v[:, :6]), strict=True):
        np.testing.assert_array_equal(a, b)


@dataclass(frozen=True)
class Device:
    platform: str
    compute_capability: str = ""


@pytest.mark.parametrize("platform, capability, changes, knob, expected", [
    ("gpu", "9.0", {}, True, "cudnn"),
    ("gpu", "8.0", {"head_dim": 128}, True, "cudnn"),
    ("gpu", "12.0", {"head_dim": 256}, True, "cudnn"),
    ("gpu", "8.9", {"head_dim": 256}, True, None),
    ("gpu", "7.5", {}, True, None),
    ("gpu", "gfx942", {}, True, None),
    ("gpu", "9.0", {"head_dim": 20}, True, None),
    ("gpu", "9.0", {"dtype": "float32"}, True, None),
    ("gpu", "9.0", {"options": (("softcap", 50.0),)}, True, None), ("gpu", "9.0", {"options": (("sinks", True),)}, True, None),
    ("gpu", "9.0", {}, False, None),
    ("tpu", "", {}, True, None)])
def test_the_devices_choose(tmp_path: Path, platform: str, capability: str, changes: dict[str, object], knob: bool,
                            expected: str | None) -> None:
    way = chosen(replace(SPEC, **changes), EngineConfig(cudnn_attention=knob), [Device(platform, capability)], tmp_path)
    assert way.fused == expected and way.kernels is None
    assert way.layout.dtype == changes.get("dtype", "bfloat16")


def test_cpus_keep_what_the_model_computes_in_whatever_can_be_built_there(tmp_path: Path) -> None:
    one, several = jax.devices("cpu")[:1], jax.devices("cpu") * 2
    ways = [chosen(SPEC, EngineConfig(native_kernels=native), devices, tmp_path)
            for native in (True, False) for devices in (one, several)]
    assert all(way.layout == SHORT.layout for way in ways) and SHORT.layout.dtype.itemsize == 2
    assert all(way == SHORT for way in ways[1:])
    assert chosen(replace(SPEC, dtype="float32"), EngineConfig(), one, tmp_path) == PLAIN


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("call", [first, later, step])
def test_keys_and_values_are_rounded_before_anything_reads_them(call, scoring: str) -> None:
    """XLA must not see through the rounding of those that it reads where they are made."""
    q = drawn(4, 16, 6, 24, seed=1)
    k, v = (drawn(4, 16 if call is first else START + 16, 2, 24, seed=seed) for seed in (2, 3))
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (k, v)]
    want, got = (jax.jit(call, static_argnums=(0, 4))(way, q, *kv, SCORINGS[scoring])
                 for way, kv in ((PLAIN, rounded), (SHORT, (k, v))))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("stage, donated", [(("insert", 4, 512, 256), True), (("decode", 0, 1, 4, 512), True),
                                            (("resize", 2, 256, 4, 512), False), (("blank", 4, 512), False)])
def test_a_cache_of_bfloat16_is_moved_as_it_is(tmp_path: Path, stage: tuple[str | int, ...], donated: bool) -> None:
    """XLA:CPU would make float32 of all of it to write one token."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("tp",))
    stages = Stages(SPEC, EngineConfig(executable_cache=str(tmp_path)), mesh)
    compiled, cache = stages._stage(*stage), stages.kv_specs(4, 512)
    assert compiled.memory_analysis().alias_size_in_bytes == (sum(a.size * 2 for a in cache) if donated else 0)
    if stages.attention.kernels is not None or stage[0] != "decode":
        assert not [a for a in cache if f"f32[{','.join(map(str, a.shape))}]" in compiled.as_text()]


@pytest.mark.parametrize("window", [None, 64])
def test_cudnn_takes_what_it_is_given(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for CUDA on this machine, with jax's own checks: shapes, types, masks and windows, not what it computes."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    way, scoring, spec = fused("cudnn", "bfloat16"), Scoring(window=window), replace(SPEC, head_dim=64)

    def lowered(call, rows: int, queries: int, keys: int, *numbers: tuple[int, ...]) -> str:
        args = [jax.ShapeDtypeStruct((rows, queries, spec.heads, spec.head_dim), jnp.float32)]
        args += [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in way.layout.shapes(spec, rows, keys)]
        args += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers]
        return jax.jit(lambda *a: call(*a, scoring)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    for text in (lowered(way.first, 1, 128, 128), lowered(way.later, 1, 128, 512, ()), lowered(way.step, 4, 1, 512, (4,))):
        assert "__cudnn$fmha" in text

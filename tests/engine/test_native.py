"""What is in C++ computes what NumPy and XLA do, a row's sums are its own, and where it cannot be built XLA serves."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from blitzjax.config import EngineConfig
from blitzjax.engine import native
from blitzjax.engine.attention import attention, chosen
from blitzjax.engine.executables import cpu_features, read_file
from blitzjax.models import blocks
from blitzjax.types import ModelSpec


def instructions(variant: native.Variant) -> tuple[str, ...]:
    return tuple(flag for flag in variant.flags if flag.startswith("-m"))


ALL_RUNNABLE = [v for v in native.VARIANTS if v.needs <= set(cpu_features().split())]
RUNNABLE = list({instructions(v): v for v in reversed(ALL_RUNNABLE)}.values())  # the best of each instruction set
PROCESS = Path(__file__).with_name("native_process.py")

pytestmark = pytest.mark.skipif(not RUNNABLE, reason="the CPU has none of the instruction sets")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Iterator[Path]:
    """What is built here may take its time, as in native_process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_BUILD_S", 600.0)
        yield tmp_path_factory.mktemp("native")


@pytest.fixture(params=RUNNABLE, ids=lambda v: v.name)
def kernels(request, directory: Path) -> native.Kernels:
    found = native._registered(request.param, directory, lambda name: None)
    assert found is not None, "needs a C++ compiler"
    return found


def operands(rows: int, k: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 1000 + k + out)
    return rng.normal(size=(rows, k)).astype(np.float32), rng.normal(size=(out, k)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("variant", [v for v in ALL_RUNNABLE if v not in RUNNABLE], ids=lambda v: v.name)
def test_cpus_of_one_instruction_set_have_the_same_bits(variant: native.Variant, directory: Path) -> None:
    """Where they fetch to, and which rows they take together, is all that differs; requests move between them."""
    one, other = (native._registered(v, directory, lambda name: None)
                  for v in (variant, next(v for v in RUNNABLE if instructions(v) == instructions(variant))))
    for rows in (1, 2, 3, 4, 8, 16, 21, 40, 130):
        for k in (100, 576):
            x, w = operands(rows, k, 100)
            np.testing.assert_array_equal(*(np.asarray(jax.jit(made.multiply)(x, w)) for made in (one, other)))


@pytest.mark.parametrize("rows, k, out", [(1, 1, 1), (1, 64, 6), (2, 31, 7), (3, 33, 13), (5, 576, 100), (8, 100, 97),
                                          (37, 65, 195), (64, 200, 3), (67, 15, 50), (130, 96, 64),
                                          (33, 31, 49), (75, 333, 200), (1, 64, 40), (2, 576, 100), (4, 96, 50)])
def test_product_is_numpys(kernels: native.Kernels, rows: int, k: int, out: int) -> None:
    x, w = operands(rows, k, out)
    exact = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ w.astype(np.float64).T
    got = np.asarray(jax.jit(kernels.multiply)(x, w))
    assert got.shape == (rows, out)
    np.testing.assert_allclose(got, exact, atol=1e-6 * k, rtol=1e-5)


@pytest.mark.parametrize("rows, k, out", [(1, 32, 1), (2, 576, 7), (3, 96, 100), (9, 64, 97), (16, 4096, 13), (37, 224, 195),
                                          (70, 32, 49), (130, 576, 64)])
def test_blocks_of_int8_give_the_bits_of_bfloat16(kernels: native.Kernels, rows: int, k: int, out: int) -> None:
    rng = np.random.default_rng(rows + k + out)
    exponents = rng.integers(-20, 20, (out, k // 32))
    exponents += np.where(np.arange(out) % 2, rng.integers(-106, 85, out), 0)[:, None]  # from -126 to 103
    w = blocks.Int8(jnp.asarray(rng.integers(-127, 128, (out, k)), jnp.int8), jnp.asarray(np.exp2(exponents), jnp.bfloat16))
    x, _ = operands(rows, k, out)
    multiply = jax.jit(kernels.multiply)
    np.testing.assert_array_equal(np.asarray(multiply(x, w)), np.asarray(multiply(x, w.multiplied())))


def test_x_is_rounded_as_xla_rounds_it(kernels: native.Kernels) -> None:
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1e-40, -0.0, np.inf, 3.4e38, np.nan], np.float32)
    x, one = ties[:, None], np.ones((1, 1), ml_dtypes.bfloat16)
    got = np.asarray(jax.jit(kernels.multiply)(x, one))
    usual = np.abs(ties) > 1e-38  # the instruction for bfloat16 takes denormals for zeros
    np.testing.assert_array_equal(got[usual], x.astype(ml_dtypes.bfloat16).astype(np.float32)[usual])


@pytest.mark.parametrize("k, out", [(1, 5), (100, 205), (576, 96), (2500, 50), (9000, 49)])
def test_a_row_does_not_depend_on_its_batch(kernels: native.Kernels, k: int, out: int) -> None:
    x, w = operands(130, k, out)
    multiply = jax.jit(kernels.multiply)
    alone = np.concatenate([np.asarray(multiply(row[None], w)) for row in x])
    for rows in (2, 3, 5, 8, 11, 15, 16, 17, 32, 64, 67, 129, 130):
        np.testing.assert_array_equal(np.asarray(multiply(x[:rows], w)), alone[:rows])


def test_products_without_gates_are_exact_in_float32(kernels: native.Kernels) -> None:
    rng = np.random.default_rng(0)
    multiply = jax.jit(kernels.multiply)
    for rows, k, out in (1, 1, 1), (3, 40, 5), (21, 577, 60):
        x, w = (rng.normal(size=s).astype(np.float32) for s in ((rows, k), (out, k)))
        got = np.asarray(multiply(x, w))
        np.testing.assert_allclose(got, x.astype(np.float64) @ w.T, rtol=1e-5, atol=1e-5)
        for row in range(rows):
            np.testing.assert_array_equal(np.asarray(multiply(x[row : row + 1], w))[0], got[row])


def test_sums_of_experts_are_a_rows_own(kernels: native.Kernels) -> None:
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(37, 3)).astype(np.float32), rng.normal(size=(37, 3, 90)).astype(np.float32)
    with blocks.using(kernels):
        weighted = jax.jit(blocks.weighted)
        got, last = np.asarray(weighted(weights, x)), np.asarray(weighted(weights[-1:], x[-1:]))
    np.testing.assert_allclose(got, np.einsum("nk,nkd->nd", weights, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, np.asarray(jax.jit(blocks.weighted)(weights, x)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last[0], got[-1])


@pytest.mark.parametrize("count", [1, 4, 8, 60, 128])
def test_softmax_is_xlas_and_a_rows_own(kernels: native.Kernels, count: int) -> None:
    x = np.random.default_rng(0).normal(size=(300, count), scale=3).astype(np.float32)
    with blocks.using(kernels):
        softmax = jax.jit(blocks.softmax)
        got, few = np.asarray(softmax(x)), np.asarray(softmax(x[-3:]))
    np.testing.assert_allclose(got, jax.nn.softmax(x), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(few, got[-3:])


def test_matmul_takes_it_for_what_it_knows(kernels: native.Kernels) -> None:
    def calls(w: jax.Array | blocks.Int8) -> bool:
        with blocks.using(kernels):
            return "ffi_call" in str(jax.make_jaxpr(lambda x: blocks.matmul(x, w))(jnp.zeros((9, 1, w.shape[-1]))))

    assert not kernels.takes(blocks.Int8(jnp.zeros((2, 48), jnp.int8), jnp.zeros((2, 3), jnp.bfloat16)))
    assert calls(jnp.zeros((2, 3, 32), jnp.bfloat16)) and calls(jnp.zeros((2, 3, 32), jnp.float32))
    assert not calls(jnp.zeros((2, 3, 32), jnp.float16))
    x, w = operands(6, 35, 12)
    with blocks.using(kernels):
        fast = jax.jit(lambda x, w: blocks.matmul(x, w, contract=2))(x.reshape(2, 3, 35), w.reshape(4, 3, 5, 7))
    plain = jax.jit(lambda x, w: blocks.matmul(x, w, contract=2))(x.reshape(2, 3, 35), w.reshape(4, 3, 5, 7))
    np.testing.assert_allclose(np.asarray(fast), np.asarray(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows, k, units", [(1, 32, 1), (2, 96, 50), (8, 64, 47), (16, 32, 131), (37, 96, 48), (70, 64, 77)])
def test_gates_are_applied_to_what_the_product_gives(kernels: native.Kernels, activation: str, rows: int, k: int,
                                                     units: int) -> None:
    x, w = operands(rows, k, 2 * units)
    w[:, 0] *= 20  # gates far from zero, too
    rng = np.random.default_rng(units)
    packed = blocks.Int8(jnp.asarray(rng.integers(-127, 128, w.shape), jnp.int8), jnp.ones((2 * units, k // 32), jnp.bfloat16))
    for weights in (w, packed):
        gates, ups = np.moveaxis(np.asarray(jax.jit(kernels.multiply)(x, weights), np.float64).reshape(rows, units, 2), 2, 0)
        inner = gates if activation == "silu" else math.sqrt(8 / math.pi) * (gates + 0.044715 * gates**3)
        got = np.asarray(jax.jit(lambda x, w: kernels.gated(activation, x, w))(x, weights))
        np.testing.assert_allclose(got, gates / (1 + np.exp(np.clip(-inner, None, 700))) * ups, rtol=1e-5, atol=1e-30)
        alone = jax.jit(lambda x, w: kernels.gated(activation, x, w))(x[-1:], weights)
        np.testing.assert_array_equal(np.asarray(alone)[0], got[-1])


def test_feed_forwards_are_gated_where_the_product_knows_how(kernels: native.Kernels) -> None:
    def traced(activation: str, shape: tuple[int, ...], dtype=jnp.bfloat16) -> str:
        with blocks.using(kernels):
            return jax.jit(lambda x, w: blocks.gated(activation, x, w)).lower(jnp.zeros((3, 1, 32)),
                                                                              jnp.zeros(shape, dtype)).as_text()

    assert "gate = 1" in traced("silu", (5, 2, 32)) and "gate = 2" in traced("gelu_tanh", (5, 2, 32))
    for other in (traced("silu", (5, 1, 32)), traced("relu", (5, 2, 32)), traced("clamped_swiglu", (5, 2, 32))):
        assert "gate = 0" in other
    assert "gate = " not in traced("silu", (5, 2, 32), jnp.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 7), (2, 64), (5, 576), (1, 40, 200)])
def test_norms_are_xlas_and_a_rows_own(kernels: native.Kernels, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(shape[-1])
    x, scale = (rng.normal(size=s).astype(np.float32) for s in (shape, shape[-1:]))
    x[..., 0] *= 50
    with blocks.using(kernels):
        norm = jax.jit(lambda x: blocks.rms_norm(x, scale, 1e-5))
        assert "ffi_call" in str(jax.make_jaxpr(norm)(x))
        got, last = np.asarray(norm(x)), np.asarray(norm(x[-1:, -1:] if x.ndim == 3 else x[-1:]))
    np.testing.assert_allclose(got, blocks.rms_norm(x, scale, 1e-5), rtol=3e-6, atol=1e-6)
    np.testing.assert_array_equal(last.ravel(), got.reshape(-1, shape[-1])[-1])


def test_layer_norms_are_xlas_and_a_rows_own(kernels: native.Kernels) -> None:
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.normal(size=s).astype(np.float32) for s in ((3, 5, 200), 200, 200))
    x += 20
    with blocks.using(kernels):
        norm = jax.jit(lambda x: blocks.layer_norm(x, scale, bias, 1e-5))
        got, last = np.asarray(norm(x)), np.asarray(norm(x[-1:, -1:]))
    np.testing.assert_allclose(got, blocks.layer_norm(x, scale, bias, 1e-5), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last.ravel(), got[-1, -1])


def test_threads_that_multiply_at_once_do_not_disturb_each_other(kernels: native.Kernels) -> None:
    """Some find the team at work."""
    multiply, pairs = jax.jit(kernels.multiply), [operands(rows, 576, 960) for rows in (1, 8, 20, 64)]
    wanted = [np.asarray(multiply(x, w)) for x, w in pairs]

    def repeat(mine: int) -> bool:
        x, w = pairs[mine]
        return all((np.asarray(multiply(x, w)) == wanted[mine]).all() for _ in range(100))

    with ThreadPoolExecutor(len(pairs)) as pool:
        assert all(pool.map(repeat, range(len(pairs))))


def test_a_model_may_map_over_it(kernels: native.Kernels) -> None:
    x, w = np.stack([operands(3, 40, 9)[0]] * 2), np.stack([operands(3, 40, 9)[1], operands(4, 40, 9)[1]])
    mapped = np.asarray(jax.jit(jax.vmap(kernels.multiply))(x, w))
    for i in range(2):
        np.testing.assert_array_equal(mapped[i], np.asarray(jax.jit(kernels.multiply)(x[i], w[i])))


SCORINGS = {"plain": blocks.Scoring(scale=0.2), "window": blocks.Scoring(window=21), "short": blocks.Scoring(window=1),
            "softcap": blocks.Scoring(0.3, softcap=4.0), "all": blocks.Scoring(0.2, window=40, softcap=2.0)}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("kv, group, hd, context", [(3, 3, 64, 256), (1, 1, 16, 32), (2, 4, 80, 64), (2, 5, 128, 96),
                                                    (1, 2, 48, 512), (1, 11, 32, 16)])
def test_attention_is_xlas_whoever_else_is_in_the_batch(kernels: native.Kernels, kv: int, group: int, hd: int,
                                                        context: int, scoring: str, sinks: bool) -> None:
    rng = np.random.default_rng(kv + group + hd)
    lasts = np.unique(np.array([0, 1, 14, 15, context // 2, context - 2, context - 1], np.int32) % context)
    q = rng.normal(size=(len(lasts), 1, kv * group, hd), scale=3).astype(np.float32)
    k = rng.normal(size=(len(lasts), kv, hd, context)).astype(ml_dtypes.bfloat16)
    v = rng.normal(size=(len(lasts), kv, context, hd)).astype(ml_dtypes.bfloat16)
    for row, last in enumerate(lasts):  # nobody looks at what is not there yet
        k[row, ..., last + 1 :], v[row, :, last + 1 :] = np.nan, np.nan
    how = SCORINGS[scoring]
    if sinks:
        how = dataclasses.replace(how, sinks=jnp.asarray(rng.normal(size=(kv, group), scale=5), jnp.float32))
    attend = jax.jit(lambda q, k, v, last: kernels.attend(q[:, 0], k, v, last, how))
    bits = [a.view(np.uint16) for a in (k, v)]
    got = np.asarray(attend(q, *bits, lasts))
    usual = attention(q, *(np.nan_to_num(a.astype(np.float32)) for a in (k, v)), lasts[:, None, None, None], how)[:, 0]
    np.testing.assert_allclose(got, np.asarray(usual), rtol=1e-5, atol=1e-5)
    for row in range(len(lasts)):
        alone = np.asarray(attend(*(a[row : row + 1] for a in (q, *bits, lasts))))
        np.testing.assert_array_equal(alone[0], got[row])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("kv, group, hd, start, queries", [(3, 3, 64, 0, 64), (1, 1, 16, 17, 13), (2, 4, 80, 40, 3),
                                                           (2, 5, 128, 30, 34), (1, 11, 32, 0, 2)])
def test_queries_of_a_prompt_attend_as_a_step_each_would(kernels: native.Kernels, kv: int, group: int, hd: int, start: int,
                                                         queries: int, scoring: str, sinks: bool) -> None:
    rows, context = 2, 64
    rng = np.random.default_rng(kv + group + hd)
    q = rng.normal(size=(rows, queries, kv * group, hd), scale=3).astype(np.float32)
    k = rng.normal(size=(rows, kv, hd, context)).astype(ml_dtypes.bfloat16)
    v = rng.normal(size=(rows, kv, context, hd)).astype(ml_dtypes.bfloat16)
    k[..., start + queries :], v[:, :, start + queries :] = np.nan, np.nan
    how = SCORINGS[scoring]
    if sinks:
        how = dataclasses.replace(how, sinks=jnp.asarray(rng.normal(size=(kv, group), scale=5), jnp.float32))
    attend = jax.jit(lambda q, k, v, last: kernels.attend(q, k, v, last, how))
    bits, at = [a.view(np.uint16) for a in (k, v)], np.arange(start, start + queries, dtype=np.int32)
    got = np.asarray(attend(q.reshape(-1, kv * group, hd), *bits, np.tile(at, rows))).reshape(rows, queries, -1)
    for query, last in enumerate(at):
        step = np.asarray(attend(q[:, query], *bits, np.full(rows, last, np.int32)))
        np.testing.assert_array_equal(got[:, query], step)
    usual = attention(q, *(np.nan_to_num(a.astype(np.float32)) for a in (k, v)), at[None, None, None], how)
    np.testing.assert_allclose(got, np.asarray(usual), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("hd, context, called", [(64, 256, True), (80, 16, True), (24, 256, False), (64, 8, False)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_cpp_attends_where_registers_are_filled(directory: Path, scoring: str, hd: int, context: int, called: bool) -> None:
    how = dataclasses.replace(SCORINGS[scoring], sinks=jnp.ones((2, 3)))
    spec = ModelSpec("tiny", "llama", 1, 6 * hd, 6, 2, hd, 128, 272, 512, 10000.0, 1e-5, True, "bfloat16")
    way = chosen(spec, EngineConfig(), jax.devices("cpu")[:1], directory)
    kv = [jnp.ones(shape, way.layout.dtype) for shape in way.layout.shapes(spec, 4, context)]
    step = jax.make_jaxpr(lambda q, last: way.step(q, *kv, last, how))(jnp.ones((4, 1, 6, hd)), jnp.arange(4))
    later = jax.make_jaxpr(lambda q, start: way.later(q, *kv, start, how))(jnp.ones((4, 5, 6, hd)), 3)
    first = jax.make_jaxpr(lambda q: way.first(q, *kv, how))(jnp.ones((4, context, 6, hd)))
    assert ["ffi_call" in str(program) for program in (step, later, first)] == [called] * 3


def test_programs_kept_on_disk_load_in_a_new_process_with_any_number_of_threads(tmp_path: Path) -> None:
    def run(threads: int) -> list[str]:
        done = subprocess.run([sys.executable, PROCESS, tmp_path], env=os.environ | {"NPROC": str(threads)},
                              capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, again, threads = run(1), run(1), run(2)
    assert first[:2] == ["compiled", "native"] and again[:2] == threads[:2] == ["loaded", "native"]
    assert first[2] == again[2] == threads[2]


def test_processes_that_start_together_build_it_once(tmp_path: Path) -> None:
    command = [sys.executable, PROCESS, tmp_path]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [p.communicate(timeout=1200)[0].split() for p in started]
    assert all(p.returncode == 0 for p in started)
    assert len({a[2] for a in answers}) == 1 and all(a[1] == "native" for a in answers)
    assert len(list(tmp_path.glob("native-*.so"))) == 1 and not list(tmp_path.glob("*.tmp"))


def test_without_a_compiler_xla_multiplies_and_the_log_says_so_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, PROCESS, tmp_path], env=os.environ | {"PATH": "/nowhere"},
                          capture_output=True, text=True, timeout=1200)
    assert done.stdout.split()[:2] == ["compiled", "plain"]
    assert done.stderr.count("no native code") == 1 and "c++" in done.stderr


def test_without_a_compiler_the_library_of_another_worker_does(kernels, directory: Path, tmp_path: Path,
                                                               monkeypatch) -> None:
    native._library(kernels.variant, directory, lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="c\\+\\+"):
        native._library(kernels.variant, tmp_path, lambda name: None)

    def damaged(name: str) -> bytes:
        *whole, last = read_file(directory, name)
        return bytes([*whole, last ^ 1])

    with pytest.raises(OSError, match="c\\+\\+"):  # what came damaged is not loaded
        native._library(kernels.variant, tmp_path, damaged)
    assert not list(tmp_path.glob("*.so"))
    assert native._library(kernels.variant, tmp_path, lambda name: read_file(directory, name))
    assert native._library(kernels.variant, tmp_path, lambda name: None)


def test_what_does_not_compile_is_not_used(directory: Path, monkeypatch, caplog) -> None:
    bad = dataclasses.replace(RUNNABLE[0], name="bad", flags=("-DXLA_FFI_DEFINE_HANDLER_SYMBOL=?",))
    monkeypatch.setattr(native, "VARIANTS", (bad,))
    with caplog.at_level(logging.WARNING):
        assert native.kernels(directory, cpu_features()) is None
    assert "no native code" in caplog.text and "matmul.cc" in caplog.text


def test_a_cpu_without_the_instructions_has_none(directory: Path) -> None:
    assert native.kernels(directory, "flags : fpu sse4_2 avx fma") is None
    assert native.kernels(directory, "") is None

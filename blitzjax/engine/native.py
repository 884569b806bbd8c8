"""Products, attention, norms and weighted sums in C++ through XLA's foreign function interface.

XLA:CPU repacks or widens the weights on every call, which for a decode step's few rows costs more than the product
(matmul.cc), and attends over all the room that a cache has, and to what comes later (attention.cc). And its numbers of one
row depend on how many others there are, and on what else is in a program; these do not, so that an answer is the same in
any batch, behind any cached prefix, and when it is run again. Optional: built
where it runs, against the headers of the jax that is installed, or taken from a worker that has built it; where the CPU
has none of the instruction sets, or nobody has a C++ compiler, XLA's own serve. Instruction sets, and XLA, differ in the
last bits: instances that shall answer alike need CPUs that do, and one of them a compiler, or none.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from blitzjax.engine.executables import Fetch, alone, checked, keep, receive
from blitzjax.engine.locations import mark_used
from blitzjax.models.blocks import BLOCK, Int8, Scoring

log = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("matmul.cc", "attention.cc", "rows.cc", "fetch.h",
                                                            "team.h", "vectors.h"))
_HANDLERS = {"matmul": "BlitzjaxMatmul", "matmul_int8": "BlitzjaxMatmulInt8",
             "matmul_float32": "BlitzjaxMatmulFloat32", "attend": "BlitzjaxAttend", "weighted": "BlitzjaxWeighted",
             "softmax": "BlitzjaxSoftmax", "rms_norm": "BlitzjaxRmsNorm", "layer_norm": "BlitzjaxLayerNorm"}
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_S = 120.0
_LANES = 16  # float32 values of the longest register
_GATES = {"silu": 1, "gelu_tanh": 2}  # kGates of matmul.cc


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile it."""

    name: str
    needs: frozenset[str]  # as /proc/cpuinfo names them
    flags: tuple[str, ...]


_BF16 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
_BF16_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16")

_AVX2, _AVX2_FLAGS = frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")
_AMD = frozenset({"clzero"})

# The best first. Comments: XLA's CPU time over ours for the layers of SmolLM2-135M, by rows, in runs that take turns.
VARIANTS = (
    # Zen 5: 2 rows 2.2, 8 2.6, 16 1.95, 32 1.55, 64 1.6, 128 1.15, 512 1.05; as on Intel's some 0.05 to 0.1 less with up to
    # 16 rows
    Variant("avx512_bf16_zen5", _BF16 | _AMD | {"avx_vnni"}, (*_BF16_FLAGS, "-DZEN5")),
    # Zen 4: 2 rows 2.9, 8 3.1, 16 2.0, 32 1.6, 64 1.4, 128 1.15, 512 1.05; as on Zen 5 8 rows 1.95, 16 1.5, 32 1.3, and
    # attention of 16 steps 0.6 times as fast
    Variant("avx512_bf16_amd", _BF16 | _AMD, (*_BF16_FLAGS, "-DAMD")),
    Variant("avx512_bf16", _BF16, _BF16_FLAGS),
    # Emerald Rapids without its bfloat16: 2 rows 1.75, 8 1.6, 16 1.4, 32 1.45, 64 1.4, 128 1.45, 512 1.5, and
    # with 8 to 128 rows 1.05 to 1.2 times that since weights are fetched ahead
    Variant("avx512", frozenset({"avx512f", "avx512bw", "avx512vl"}),
            ("-mavx512f", "-mavx512bw", "-mavx512vl")),
    # Zen 4, which stands for those before it: 16 rows 1.05 times as fast as the next, attention of 16 steps 1.5 times
    Variant("avx2_amd", _AVX2 | _AMD, (*_AVX2_FLAGS, "-DAMD")),
    # Emerald Rapids, whose XLA has AVX-512: 2 rows 1.6, 8 1.2, 16 0.9, 64 0.85. A CPU without it was not at hand
    Variant("avx2", _AVX2, _AVX2_FLAGS),
)


@dataclass(frozen=True)  # without slots: jax.jit refers to it weakly
class Kernels:
    """Callable where a program for the CPU is traced. Programs that hold them load once `kernels` has been called."""

    variant: Variant

    def takes(self, w: jax.Array | Int8) -> bool:
        """Whether it multiplies rows with weights [out, k]: float32 ones, too, whose sums are a row's own then."""
        return _short(w) or not isinstance(w, Int8) and w.dtype == jax.numpy.float32

    def multiply(self, x: jax.Array, w: jax.Array | Int8) -> jax.Array:
        """f32[rows, k], [out, k] → f32[rows, out]"""
        if isinstance(w, Int8) or w.dtype != jax.numpy.float32:
            return self._multiplied(x, w, gate=0, ways=1)
        return self._called("matmul_float32", (x.shape[0], w.shape[0]), x, w)

    def gates(self, activation: str, w: jax.Array | Int8) -> bool:
        """Whether `gated` takes it."""
        return activation in _GATES and _short(w)

    def gated(self, activation: str, x: jax.Array, w: jax.Array | Int8) -> jax.Array:
        """f32[rows, k], [2 * out, k], each unit's gate and up → activated gate times up, f32[rows, out]"""
        return self._multiplied(x, w, gate=_GATES[activation], ways=2)

    def _multiplied(self, x: jax.Array, w: jax.Array | Int8, gate: int, ways: int) -> jax.Array:
        kind, weights = ("matmul_int8", (w.values, w.scales)) if isinstance(w, Int8) else ("matmul", (w,))
        return self._called(kind, (x.shape[0], weights[0].shape[0] // ways), x, *weights, gate=np.int64(gate))

    def weighted(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """f32[N, K], f32[N, K, D] → f32[N, D]"""
        return self._called("weighted", (x.shape[0], x.shape[2]), weights, x)

    def softmax(self, x: jax.Array) -> jax.Array:
        """f32[N, E] → f32[N, E]"""
        return self._called("softmax", x.shape, x)

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """f32[..., *D], f32[*D] → f32[..., *D]"""
        return self._called("rms_norm", x.shape, x, scale, eps=np.float32(eps))

    def layer_norm(self, x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
        """f32[..., D], twice f32[D] → f32[..., D]"""
        return self._called("layer_norm", x.shape, x, scale, bias, eps=np.float32(eps))

    def _called(self, kind: str, shape: tuple[int, ...], *args: jax.Array, **attributes: np.generic) -> jax.Array:
        """→ f32[*shape]"""
        out = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
        return jax.ffi.ffi_call(_target(kind, self.variant), out, vmap_method="sequential")(*args, **attributes)

    def attends(self, k: jax.Array) -> bool:
        """Whether `attend` takes such keys."""
        return k.dtype == np.uint16 and k.shape[2] % _LANES == 0 and k.shape[3] % _LANES == 0

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, last: jax.Array, scoring: Scoring) -> jax.Array:
        """f32[R, H, hd], bits of bfloat16 u16[B, KV, hd, S] and u16[B, KV, S, hd], i32[R] → f32[R, H * hd]; of R / B rows
        for each of the cache, row r reads up to last[r].
        """
        shape = (q.shape[0], q.shape[1] * q.shape[2])
        q = q * (q.shape[2] ** -0.5 if scoring.scale is None else scoring.scale)
        sinks = jax.numpy.float32(-np.inf) if scoring.sinks is None else scoring.sinks.astype(jax.numpy.float32)
        sinks = jax.numpy.broadcast_to(sinks, (k.shape[1], q.shape[1] // k.shape[1]))
        window = k.shape[3] if scoring.window is None else scoring.window
        return self._called("attend", shape, q, k, v, last, sinks, window=np.int64(window),
                            softcap=np.float32(scoring.softcap or 0))

    def source(self) -> str:
        """What it computes, for whoever keeps programs that call it."""
        return _source(self.variant)


def _short(w: jax.Array | Int8) -> bool:
    """bfloat16, or int8 in whole blocks."""
    if isinstance(w, Int8):
        return w.values.shape[1] == w.scales.shape[1] * BLOCK
    return w.dtype == jax.numpy.bfloat16


def best(cpu_features: str) -> Variant | None:
    """Of VARIANTS, for a CPU; None where none can run."""
    return next((v for v in VARIANTS if v.needs <= set(cpu_features.split())), None)


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


_REGISTERED: set[Variant] = set()  # with XLA, once and for the whole process


def kernels(directory: Path, cpu_features: str, fetch: Fetch = lambda name: None) -> Kernels | None:
    """The best for the CPU, fetched or built into `directory` unless it is there; None where none can run.

    Several processes may share the directory.
    """
    found = best(cpu_features)
    if found is None:
        log.info("no native code for this CPU")
        return None
    return _registered(found, directory, fetch)


def _registered(variant: Variant, directory: Path, fetch: Fetch) -> Kernels | None:
    if variant in _REGISTERED:
        return Kernels(variant)
    try:
        library = _library(variant, directory, fetch)
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("no native code, decoding is slower: %s", getattr(e, "stderr", None) or e)
        return None
    for kind, symbol in _HANDLERS.items():
        jax.ffi.register_ffi_target(_target(kind, variant), jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    _REGISTERED.add(variant)
    return Kernels(variant)


def _target(kind: str, variant: Variant) -> str:
    return f"blitzjax_{kind}_{variant.name}"


def _source(variant: Variant) -> str:
    return "\n".join([*(source.read_text("utf-8") for source in _SOURCES), *_FLAGS, *variant.flags])


def _library(variant: Variant, directory: Path, fetch: Fetch) -> ctypes.CDLL:
    """Raises OSError or subprocess.SubprocessError."""
    digest = hashlib.sha256("\n".join([_source(variant), jax.__version__, "checksum last"]).encode()).hexdigest()[:16]
    path = directory / f"native-{variant.name}-{digest}.so"
    with alone(path):
        found = _opened(path)
        if found is None and receive(path, fetch):
            found = _opened(path)
        if found is None:
            _build(variant, path)
    return ctypes.CDLL(str(path)) if found is None else found


def _opened(path: Path) -> ctypes.CDLL | None:
    """None if it is not there, is damaged, or was built on a machine that is too unlike this one."""
    try:
        checked(path.read_bytes())
        mark_used(path)
        return ctypes.CDLL(str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.warning("%s does not load (%s); building it again", path.name, e)
        return None


def _build(variant: Variant, path: Path) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    found = compiler()
    if found is None:
        raise OSError(f"none of {', '.join(_COMPILERS)} is installed (on Debian: apt install g++)")
    draft = path.with_suffix(f".built.{os.getpid()}.tmp")
    units = [str(source) for source in _SOURCES if source.suffix == ".cc"]
    command = [found, *_FLAGS, *variant.flags, f"-I{jax.ffi.include_dir()}", *units, "-o", str(draft)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_S)
        keep(path, draft.read_bytes())  # whoever loads it does not mind bytes behind it
    finally:
        draft.unlink(missing_ok=True)

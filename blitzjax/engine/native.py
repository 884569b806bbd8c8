"""The product of float32 rows with bfloat16 weights, in C++ (matmul.cc) through XLA's foreign function interface.

XLA:CPU repacks or widens the weights on every call, which for a decode step's few rows costs more than the product.
Optional: built where it runs, against the headers of the jax that is installed; where the CPU has none of the
instruction sets or there is no C++ compiler, XLA's own product serves. Instruction sets, and XLA, differ in the last
bits: instances that shall answer alike need CPUs that do, and all of them a compiler or none.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("matmul.cc")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_S = 120.0
FEW_ROWS = 32  # kFewRows of matmul.cc: up to there, and beyond, a row's sums do not depend on how many others there are


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile the product. `max_rows`: with more, XLA's is as fast."""

    name: str
    needs: frozenset[str]  # as /proc/cpuinfo names them
    flags: tuple[str, ...]
    max_rows: float


# The best first. Comments: XLA's CPU time over ours for the layers of SmolLM2-135M, by rows, in runs that take turns.
VARIANTS = (
    # Zen 5, an earlier form of the loops: 8 rows 1.6, 16 1.3, 64 1.1, 128 below 1
    Variant("avx512_bf16", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}),
            ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"), 64),
    # Emerald Rapids without its bfloat16: 2 rows 1.75, 8 1.6, 16 1.4, 32 1.45, 64 1.4, 128 1.45, 512 1.5
    Variant("avx512", frozenset({"avx512f", "avx512bw", "avx512vl"}),
            ("-mavx512f", "-mavx512bw", "-mavx512vl"), math.inf),
    # the same, whose XLA has AVX-512: 2 rows 1.6, 8 1.2, 16 0.9, 64 0.85
    Variant("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma"), 8),
)


@dataclass(frozen=True)  # without slots: jax.jit refers to it weakly
class Product:
    """Callable where a program for the CPU is traced. Programs that hold it load once `product` has been called."""

    variant: Variant
    max_rows: float

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """f32[rows, k], bf16[out, k] → f32[rows, out]"""
        out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jax.numpy.float32)
        return jax.ffi.ffi_call(_target(self.variant), out)(x, w)

    def source(self) -> str:
        """What it computes, for whoever keeps programs that call it."""
        return _source(self.variant)


_REGISTERED: set[Variant] = set()  # with XLA, once and for the whole process


def product(directory: Path, cpu_features: str) -> Product | None:
    """The best of VARIANTS for the CPU, built into `directory` unless it is there; None where none can run.

    Several processes may share the directory.
    """
    found = next((v for v in VARIANTS if v.needs <= set(cpu_features.split())), None)
    if found is None:
        log.info("no native matmul for this CPU")
        return None
    return _registered(found, directory)


def _registered(variant: Variant, directory: Path) -> Product | None:
    if variant in _REGISTERED:
        return Product(variant, variant.max_rows)
    try:
        library = ctypes.CDLL(str(_built(variant, directory)))
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("no native matmul, decoding is slower: %s", getattr(e, "stderr", None) or e)
        return None
    jax.ffi.register_ffi_target(_target(variant), jax.ffi.pycapsule(library.BlitzjaxMatmul), platform="cpu")
    _REGISTERED.add(variant)
    return Product(variant, variant.max_rows)


def _target(variant: Variant) -> str:
    return f"blitzjax_matmul_{variant.name}"


def _source(variant: Variant) -> str:
    return "\n".join([_SOURCE.read_text(), *_FLAGS, *variant.flags])


def _built(variant: Variant, directory: Path) -> Path:
    """Raises OSError or subprocess.SubprocessError."""
    digest = hashlib.sha256("\n".join([_source(variant), jax.__version__]).encode()).hexdigest()[:16]
    library = directory / f"matmul-{variant.name}-{digest}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
            if compiler is None:
                raise OSError(f"none of {', '.join(_COMPILERS)} is installed (on Debian: apt install g++)")
            draft = library.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler, *_FLAGS, *variant.flags, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(draft)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_S)
            draft.replace(library)
    return library

"""Does somebody's own model do what the engine asks of it? Tried on shapes alone, before anything is converted or compiled.

Invariant: whatever is wrong is said in one CheckpointError.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from blitzjax.engine.modules import bind, kind_arrays
from blitzjax.errors import CheckpointError
from blitzjax.models import blocks, family
from blitzjax.types import ModelSpec

_SIZES = ((1, 32), (2, 1))  # rows and tokens: of a prompt's chunk, of a decode step


def check(spec: ModelSpec) -> None:
    """Raises CheckpointError unless the modules are as models/family.py has them."""
    if wrong := list(_wrong_sizes(spec)):
        raise CheckpointError(f"{spec.family}: ModelSpec's {'; '.join(wrong)}")
    kinds = spec.layer_kinds or ("layer",) * spec.layers
    if len(kinds) != spec.layers or {"embed", "head"} & {*kinds}:
        raise CheckpointError(f"{spec.family}: layer_kinds needs a word for each of {spec.layers} layers, other than embed "
                              f"and head; it is {', '.join(kinds)}")
    said: dict[str, list[str]] = {}
    for kind in ("embed", *dict.fromkeys(kinds), "head"):
        for problem in _tried(spec, kind):
            said.setdefault(problem, []).append(kind)
    if said:
        raise CheckpointError(f"{spec.family} does not run, models/family.py says how it should: "
                              + "; ".join(f"{', '.join(where)}: {problem}" for problem, where in said.items()))


def _wrong_sizes(spec: ModelSpec) -> Iterator[str]:
    """What would fail in workers, or name nothing."""
    if not isinstance(spec.name, str) or not spec.name:
        yield f"name must be a text that is not empty, got {spec.name!r}"
    for name in ("layers", "dim", "kv_heads", "head_dim", "vocab", "max_len"):
        if type(size := getattr(spec, name)) is not int or size < 1:
            yield f"{name} must be an int, at least 1, got {size!r}"
    for name, kind in (("eos_token_ids", int), ("layer_kinds", str)):
        if not isinstance(given := getattr(spec, name), tuple) or any(type(item) is not kind for item in given):
            yield f"{name} must be a tuple of {kind.__name__}, got {given!r}"


def _tried(spec: ModelSpec, kind: str) -> list[str]:
    """What is wrong with modules of `kind`, at the first of the sizes where something is."""
    try:
        found = [f"{a.name} is {list(a.shape)}, its axes are {a.axes}"
                 for a in kind_arrays(spec, kind) if len(a.axes) != len(a.shape)]
        return found or next(filter(None, (list(_wrong(spec, kind, *sizes)) for sizes in _SIZES)), [])
    except CheckpointError:
        raise
    except Exception as e:  # the user's code may raise anything
        return [f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"]


def _wrong(spec: ModelSpec, kind: str, rows: int, width: int) -> Iterator[str]:
    scorings: list[blocks.Scoring] = []
    attended: list[tuple[jax.Array, jax.Array, jax.Array]] = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, scoring: blocks.Scoring = blocks.PLAIN) -> jax.Array:
        scorings.append(scoring)
        attended.append((q, k, v))
        return jnp.zeros((*q.shape[:2], q.shape[2] * q.shape[3]), jnp.float32)

    def run(weights, table, x, ids):
        module = bind(spec, kind)(weights)
        if kind == "embed":
            return module(ids, ids), attended
        if kind == "head":
            return module(x[:, 0], table), attended
        return module(x, family(spec.family).aux(spec, ids), attend), attended

    weights, embedding = ({a.name: jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kind_arrays(spec, unit)}
                          for unit in (kind, "embed"))
    table = embedding.get("table") if spec.tied_embeddings else None
    if kind == "embed" and spec.tied_embeddings and (table is None or table.shape != (spec.vocab, spec.dim)):
        yield f"tied_embeddings needs its Param table, of {[spec.vocab, spec.dim]}"
    x = jax.ShapeDtypeStruct((rows, width, spec.dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    traced, (out, asked) = jax.make_jaxpr(run, return_shape=True)(weights, table, x, ids)
    wanted = jax.ShapeDtypeStruct((rows, spec.vocab), jnp.float32) if kind == "head" else x
    if _said(out) != _said(wanted):
        yield f"gives {_said(out)}, not {_said(wanted)}"
    if any(isinstance(const, jax.core.Tracer) for const in traced.consts):
        yield "calls attend inside jax.checkpoint, jit, scan or the like"
    if len(asked) > 1:
        yield f"calls attend {len(asked)} times, not once or never"
    heads = [rows, width, spec.kv_heads, spec.head_dim]
    for q, k, v in asked:
        if not [*k.shape] == [*v.shape] == heads:
            yield f"keys are {[*k.shape]}, values {[*v.shape]}, not [B, T, kv_heads, head_dim], here {heads}"
        if len(q.shape) != 4 or q.shape[2] % spec.kv_heads or [q.shape[i] for i in (0, 1, 3)] != [rows, width, spec.head_dim]:
            yield f"queries are {[*q.shape]}, not [B, T, a multiple of kv_heads, head_dim], with keys of {heads}"
    for s in scorings:
        if any(not isinstance(n, numbers.Real | None) for n in (s.scale, s.window, s.softcap)):
            yield "scale, window and softcap of a Scoring are numbers, not arrays"


def _said(tree: object) -> str:
    if isinstance(tree, jax.ShapeDtypeStruct):
        return f"{tree.dtype}{[*tree.shape]}"
    return f"a {type(tree).__name__}"

"""The compiled pieces that every pass through the model is made of: embed, one layer, head, and KV placement.

Invariant: one executable per (kind, shape) serves all layers of a kind, with parameters as arguments, so any range of
layers is a slice and a pass cut anywhere computes bit for bit what the whole computes. Decode steps are never cut:
theirs may run `engine.fused_layers` layers at a time, kept apart by a barrier that no operation is fused across.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax.stages import Compiled

from blitzjax.config import EngineConfig
from blitzjax.engine import modules, params, sampling
from blitzjax.engine.attention import Attention, chosen
from blitzjax.engine.executables import ExecutableCache, Fetch, Program
from blitzjax.engine.locations import executables_in
from blitzjax.engine.shapes import Shapes, shapes_for
from blitzjax.errors import ConfigError, TransferError
from blitzjax.models import blocks, family, own
from blitzjax.models.rope import for_context
from blitzjax.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, ModelSpec, Span

Params = dict[str, Array]
KV = tuple[Array, Array]
_HEAD_ROWS = 2  # a prompt's last row, padded: see shapes._MIN_BATCH


class Stages:
    """Every executable of one model on one mesh. Built once, before the instance reports ready; then read only."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, mesh: Mesh, attention: Attention | None = None,
                 fetch: Fetch = lambda name: None):
        """`attention`: instead of what the devices get. `fetch`: where executables may be had from."""
        if own.is_reference(spec.family):
            own.check_unchanged(spec.family)
        self.spec = spec = for_context(spec, config.max_model_len)
        self.mesh, self.rules = mesh, params.ShardingRules(mesh.size)
        self.shapes: Shapes = shapes_for(spec, config)
        self.kinds = tuple(dict.fromkeys(params.unit_kind(spec, layer) for layer in range(spec.layers)))
        self.groups = _groups(spec, max(1, config.fused_layers))
        devices = mesh.devices.flatten().tolist()
        directory = executables_in(config.executable_cache)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"compiled stages cannot be kept in {directory}: {e.strerror}; BLITZJAX_CACHE or "
                              "engine.executable_cache may name another directory") from e
        attention = attention or chosen(spec, config, devices, directory, fetch)
        self.layout = attention.layout  # of keys and values
        heads = params.ArrayInfo("kv", (spec.kv_heads,), self.layout.dtype, ("kv_heads",))
        self.kv_sharding = NamedSharding(mesh, P(*[None] * self.layout.heads, *self.rules.partition(heads)))
        self.attention = replace(attention, split=self.kv_sharding) if mesh.size > 1 else attention
        self.replicated = NamedSharding(mesh, P())
        self.cache = ExecutableCache(directory, _fingerprint(spec, self.attention) + self._own_code(), devices, fetch)
        self._found: dict[tuple, Compiled] = {}

    # ---- what the runner calls; arrays in brackets are [rows, ...] as compiled ------------------------------------

    def embed(self, weights: Params, tokens: np.ndarray, positions: np.ndarray) -> tuple[Array, object]:
        """i32[B, T], i32[B, T] → residual f32[B, T, D] and the model's per-step constants (rope tables)."""
        return self._stage("embed", *tokens.shape)(weights, tokens, positions)

    def aux(self, positions: np.ndarray) -> object:
        """i32[B, T] → the per-step constants alone, for a residual that came from elsewhere."""
        return self._stage("aux", *positions.shape)(positions)

    def first(self, kind: str, weights: Params, x: Array, aux, context: int) -> tuple[Array, Array, Array]:
        """A layer of `kind` over the first chunk of a prompt. → x, k and v of `context` tokens as `layout` has them."""
        return self._stage("first", kind, x.shape[1], context)(weights, x, aux)

    def next(self, kind: str, weights: Params, x: Array, aux, kv: KV, start: int) -> tuple[Array, Array, Array]:
        """A layer of `kind` over a later chunk at `start`; kv is donated and returned with the chunk's rows written."""
        return self._stage("next", kind, x.shape[1], self.layout.tokens(kv))(weights, x, aux, *kv, np.int32(start))

    def decode(self, group: Span, weights: list[Params], x: Array, aux, kv: list[KV], lengths) -> tuple[Array, list[KV]]:
        """The layers of one of `groups`, one token per row at position `lengths` i32[B]; kv is donated and returned."""
        first = self.groups[group]
        sizes = first.start, first.stop, x.shape[0], self.layout.tokens(kv[0])
        return self._stage("decode", *sizes)(weights, x, aux, kv, lengths)

    def last_row(self, x: Array, row: int) -> Array:
        """f32[1, T, D] → f32[2, 1, D]: row `row`, padded to the batch that the head is compiled for."""
        return self._stage("last_row", x.shape[1])(x, np.int32(row))

    def draws(self, rows: int, edited: bool) -> sampling.Draws:
        """Greedy draws for `head`; with room for edits when some row asks for them."""
        draws = sampling.greedy_draws(rows)
        return draws._replace(edits=sampling.no_edits(rows, self.spec, self.shapes.contexts[-1])) if edited else draws

    def head(self, weights: Params, table: Array | None, x: Array, draws: sampling.Draws) -> Array:
        """f32[B, 1, D] → i32[B] next tokens; with edits i32[B, ...] as `sampling.describe` packs them."""
        rows, edits = x.shape[0], draws.edits
        if edits is None and draws.greedy:
            return self._stage("head_greedy", rows)(weights, table, x)
        logits = self._stage("logits", rows)(weights, table, x)
        if edits is None:
            return self._stage("sample", rows)(logits, draws)
        edited = self._stage("edit", rows, edits.history.shape[1])(logits, edits)
        tokens = self._stage("sample", rows)(edited, draws._replace(edits=None))
        return self._stage("described", rows)(logits, tokens, edits.logprobs)

    def score(self, weights: Params, table: Array | None, x: Array, tokens: np.ndarray) -> Array:
        """f32[1, T, D], i32[T] → i32[T, ...]: what the head says of tokens[t] after row t, see `sampling.describe`."""
        return self._stage("score", x.shape[1], self.shapes.widths[0])(weights, table, x, tokens)

    def insert(self, k: Array, v: Array, k_new: Array, v_new: Array, slot: int) -> tuple[Array, Array]:
        """Writes a prompt's KV [1, ...] into row `slot` of a decode cache; k and v are donated."""
        sizes = k.shape[0], self.layout.tokens((k, v)), self.layout.tokens((k_new, v_new))
        return self._stage("insert", *sizes)(k, v, k_new, v_new, np.int32(slot))

    def blank(self, rows: int, context: int) -> tuple[Array, Array]:
        """An empty decode cache of one layer, in memory of its own, so that steps can update it in place."""
        return self._stage("blank", rows, context)()

    def resize(self, k: Array, v: Array, order: np.ndarray, context: int) -> tuple[Array, Array]:
        """Row i of the result is row order[i] of the cache; the length is cut or padded to `context`."""
        return self._stage("resize", k.shape[0], self.layout.tokens((k, v)), len(order), context)(k, v, order)

    def fitted(self, kv: KV, length: int) -> KV:
        """Keys and values of one layer of one sequence, cut or padded to `length` tokens."""
        return kv if self.layout.tokens(kv) == length else self.resize(*kv, np.zeros(1, np.int32), length)

    # ---- compilation ------------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Takes from the executable cache what was compiled before. → how many are still to be compiled. Computes nothing,
        so it may run on any core.
        """
        names = {_name(*stage): stage for stage in self._all()}
        self._found |= {names[name]: found for name, found in self.cache.load(list(names)).items()}
        return len(names) - len(self._found)

    def compile_all(self, begin: float = 0.0) -> None:
        """Compiles, or loads from the executable cache, every stage at every bucket. `begin` in [0, 1): which part of
        them comes first; workers that begin at different parts, and share what they compile, divide the work.
        """
        stages = list(self._all())
        first = int(begin * len(stages))
        for stage in stages[first:] + stages[:first]:
            self._stage(*stage)

    def _all(self) -> Iterator[tuple[str, *tuple[str | int, ...]]]:
        """Kind and sizes of every stage that an instance which works alone needs."""
        s = self.shapes
        for width in s.widths:
            yield from (("embed", 1, width), ("aux", 1, width), ("last_row", width), ("score", width, s.widths[0]))
        for kind in self.kinds:
            yield from (("first", kind, *sizes) for sizes in s.first_chunks())
            yield from (("next", kind, *sizes) for sizes in s.next_chunks())
        for rows in s.batches:
            yield from (("embed", rows, 1), ("head_greedy", rows), ("logits", rows), ("sample", rows))
            yield from (("edit", rows, s.contexts[-1]), ("described", rows))
            for context in s.contexts:
                yield from (("decode", g.start, g.stop, rows, context) for g in dict.fromkeys(self.groups.values()))
                yield "blank", rows, context
                yield from (("insert", rows, context, staged) for staged in s.contexts if staged <= context)
        for a, b in (*pairwise(s.batches), *pairwise(s.batches[::-1])):
            yield from (("resize", a, context, b, context) for context in s.contexts)
        for a, b in (*pairwise(s.contexts), *pairwise(s.contexts[::-1])):
            yield from (("resize", rows, a, rows, b) for rows in s.batches)

    def compile_moves(self) -> None:
        """What is needed besides to take sequences out of a cache: alone, cut to travel, padded again."""
        s = self.shapes
        for context in s.contexts:
            for rows in s.batches:
                self._stage("resize", rows, context, 1, context)
            for width in s.moves:
                if width < context:
                    self._stage("resize", 1, context, 1, width)
        for width in s.moves:
            if width < s.contexts[0]:
                self._stage("resize", 1, width, 1, s.contexts[0])

    def compiled(self) -> Iterator[tuple[Compiled, tuple]]:
        """Every stage so far, and the arguments it takes, as pytrees of ShapeDtypeStruct with shardings."""
        return ((found, self._program(*stage).args) for stage, found in list(self._found.items()))

    @property
    def temporary_bytes(self) -> int:
        """What the compiled stage that needs most takes on a device besides its arguments, results included."""
        stats = [stage.memory_analysis() for stage in self._found.values()]
        return max((s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in stats if s), default=0)

    def _stage(self, kind: str, *sizes: int | str) -> Compiled:
        """With the cache's fingerprint, kind and sizes say all that a `_build_...` makes a program from."""
        found = self._found.get((kind, *sizes))
        if found is None:
            name = _name(kind, *sizes)
            try:
                with blocks.using(self.attention.kernels):
                    found = self._found[(kind, *sizes)] = self.cache.get(name, lambda: self._program(kind, *sizes))
            except RuntimeError as e:
                if self.attention.fused != "cudnn" or kind not in ("first", "next", "decode") or "RESOURCE_EXHAUSTED" in str(e):
                    raise
                raise ConfigError(f"{name} of {self.spec.name} does not compile with cuDNN's attention; without it: "
                                  f"engine.cudnn_attention=false. {e}") from e
        return found

    def _program(self, kind: str, *sizes: int | str) -> Program:
        return Program(*getattr(self, f"_build_{kind}")(*sizes))

    def _own_code(self) -> str:
        """What somebody's own modules compute, as programs of each size that they see: their code may import and read
        anything, and look at shapes.
        """
        if not own.is_reference(self.spec.family):
            return ""
        s, groups = self.shapes, dict.fromkeys(self.groups.values())
        stages: list[tuple[str, *tuple[str | int, ...]]] = [
            *(("embed", 1, width) for width in s.widths), *(("embed", rows, 1) for rows in s.batches),
            *(("head_greedy", rows) for rows in (s.widths[0], *s.batches)),
            *(("first", kind, width, s.context(width)) for kind in self.kinds for width in s.widths),
            *(("decode", g.start, g.stop, rows, s.contexts[0]) for g in groups for rows in s.batches)]
        with blocks.using(self.attention.kernels):
            return "\n".join(self._program(*stage).lowered().as_text() for stage in stages)

    def _abstract(self, shape: tuple[int, ...], dtype=jnp.float32, sharding=None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.replicated)

    def _weights(self, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
        return {a.name: self._abstract(a.shape, a.dtype, NamedSharding(self.mesh, self.rules.partition(a)))
                for a in modules.kind_arrays(self.spec, kind)}

    def kv_specs(self, rows: int, context: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        k, v = self.layout.shapes(self.spec, rows, context)
        return (self._abstract(k, self.layout.dtype, self.kv_sharding),
                self._abstract(v, self.layout.dtype, self.kv_sharding))

    def taken_specs(self, layout: str, tokens: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Of one sequence's keys and values that lie elsewhere as `layout` says. Raises TransferError if not so here."""
        if layout != self.layout.name:
            raise TransferError(f"KV comes as {layout}, and is {self.layout.name} here: the workers of a cluster must have "
                                "devices of one kind")
        return self.kv_specs(1, tokens)

    def _zeros(self, rows: int, tokens: int) -> KV:
        k, v = self.layout.shapes(self.spec, rows, tokens)
        return jnp.zeros(k, self.layout.dtype), jnp.zeros(v, self.layout.dtype)

    def _activations(self, rows: int, width: int):
        """Abstract x and aux of a stage over [rows, width] tokens."""
        return self._abstract((rows, width, self.spec.dim)), self._abstract_tree(_aux_shapes(self.spec, rows, width))

    def _build_embed(self, rows: int, width: int):
        module, spec = modules.bind(self.spec, "embed"), self.spec
        aux = family(spec.family).aux

        def embed(weights, tokens, positions):
            return module(weights)(tokens, positions), aux(spec, positions)

        ids = self._abstract((rows, width), jnp.int32)
        return embed, (self._weights("embed"), ids, ids), (), self.replicated

    def _build_aux(self, rows: int, width: int):
        aux = functools.partial(family(self.spec.family).aux, self.spec)
        return aux, (self._abstract((rows, width), jnp.int32),), (), self.replicated

    def _build_first(self, kind: str, width: int, context: int):
        module = modules.bind(self.spec, kind)

        def first(weights, x, aux):
            kept = []

            def attend(q, k, v, scoring=blocks.PLAIN):
                kept.extend(self.layout.kept(k, v))
                return self.attention.first(q, *kept, scoring)

            x = module(weights)(x, aux, attend)
            return x, *self.layout.fitted(kept or self._zeros(1, width), context)

        out = (self.replicated, self.kv_sharding, self.kv_sharding)
        return first, (self._weights(kind), *self._activations(1, width)), (), out

    def _build_next(self, kind: str, width: int, context: int):
        module = modules.bind(self.spec, kind)

        def next_chunk(weights, x, aux, k, v, start):
            cache = []

            def attend(q, k_new, v_new, scoring=blocks.PLAIN):
                cache.extend(self.layout.written((k, v), (k_new, v_new), start))
                return self.attention.later(q, *cache, start, scoring)

            x = module(weights)(x, aux, attend)
            return x, *(cache or (k, v))

        args = (self._weights(kind), *self._activations(1, width), *self.kv_specs(1, context),
                self._abstract((), jnp.int32))
        return next_chunk, args, (3, 4), (self.replicated, self.kv_sharding, self.kv_sharding)

    def _build_decode(self, start: int, stop: int, rows: int, context: int):
        kinds = [params.unit_kind(self.spec, layer) for layer in range(start, stop)]
        bound = [modules.bind(self.spec, kind) for kind in kinds]

        def decode(weights, x, aux, kv, lengths):
            caches = [*kv]  # of a layer that does not attend, as they are

            def attend(layer, q, k_new, v_new, scoring=blocks.PLAIN):
                caches[layer] = self.layout.appended(kv[layer], (k_new, v_new), lengths)
                return self.attention.step(q, *caches[layer], lengths, scoring)

            for layer, module in enumerate(bound):
                x = lax.optimization_barrier(x) if layer else x
                x = module(weights[layer])(x, aux, functools.partial(attend, layer))
            return x, caches

        kv = [self.kv_specs(rows, context) for _ in kinds]
        args = ([self._weights(kind) for kind in kinds], *self._activations(rows, 1), kv,
                self._abstract((rows,), jnp.int32))
        return decode, args, (3,), (self.replicated, self.kv_sharding)

    def _build_last_row(self, width: int):
        def last_row(x, row):
            return jnp.broadcast_to(lax.dynamic_slice_in_dim(x, row, 1, axis=1), (_HEAD_ROWS, 1, x.shape[2]))

        return last_row, (self._abstract((1, width, self.spec.dim)), self._abstract((), jnp.int32)), (), self.replicated

    def _build_head_greedy(self, rows: int):
        module = modules.bind(self.spec, "head")

        def head_greedy(weights, table, x):
            return sampling.greedy(module(weights)(x[:, 0], table))

        return head_greedy, self._head_args(rows), (), self.replicated

    def _build_logits(self, rows: int):
        """Whole on every device: one gather, where each step of a bisection and each branch of sampling would need
        collectives of its own.
        """
        def logits(weights, table, x):
            return self._logits(weights, table, x[:, 0])

        return logits, self._head_args(rows), (), self.replicated

    def _build_sample(self, rows: int):
        args = self._vocabulary(rows), self._abstract_tree(sampling.greedy_draws(rows))
        return sampling.sample, args, (), self.replicated

    def _build_edit(self, rows: int, context: int):
        edits = self._abstract_tree(sampling.no_edits(rows, self.spec, context))
        return sampling.edit, (self._vocabulary(rows), edits), (), self.replicated

    def _build_described(self, rows: int):
        args = self._vocabulary(rows), self._abstract((rows,), jnp.int32), self._abstract((rows,), jnp.bool_)
        return sampling.described, args, (), self.replicated

    def _build_score(self, width: int, narrow: int):
        """A narrow chunk's rows at a time, so that the logits of a wide one are never in memory together."""
        def score(weights, table, x, tokens):
            parts = lax.map(lambda part: sampling.describe(self._logits(weights, table, part[0]), part[1]),
                            (x.reshape(-1, narrow, x.shape[2]), tokens.reshape(-1, narrow)))
            return parts.reshape(width, -1)

        weights, table, _ = self._head_args(narrow)
        args = (weights, table, self._abstract((1, width, self.spec.dim)), self._abstract((width,), jnp.int32))
        return score, args, (), self.replicated

    def _logits(self, weights: Params, table: Array | None, x: Array) -> Array:
        """f32[rows, D] → f32[rows, vocab]. Each device multiplies its part of the vocabulary: else XLA gathers weights."""
        logits = modules.bind(self.spec, "head")(weights)(x, table)
        if self.spec.vocab % self.mesh.size == 0:
            logits = lax.with_sharding_constraint(logits, NamedSharding(self.mesh, P(None, params.TP_AXIS)))
        return lax.with_sharding_constraint(logits, self.replicated)

    def _head_args(self, rows: int):
        table = self._weights("embed")["table"] if self.spec.tied_embeddings else None
        return self._weights("head"), table, self._abstract((rows, 1, self.spec.dim))

    def _vocabulary(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._abstract((rows, self.spec.vocab))

    def _abstract_tree(self, tree):
        return jax.tree.map(lambda a: self._abstract(a.shape, a.dtype), tree)

    def _build_insert(self, rows: int, context: int, staged: int):
        def insert(k, v, k_new, v_new, slot):
            return (lax.dynamic_update_slice(k, k_new, (slot, 0, 0, 0)),
                    lax.dynamic_update_slice(v, v_new, (slot, 0, 0, 0)))

        args = (*self.kv_specs(rows, context), *self.kv_specs(1, staged), self._abstract((), jnp.int32))
        return insert, args, (0, 1), (self.kv_sharding, self.kv_sharding)

    def _build_blank(self, rows: int, context: int):
        return functools.partial(self._zeros, rows, context), (), (), (self.kv_sharding, self.kv_sharding)

    def _build_resize(self, rows: int, context: int, new_rows: int, new_context: int):
        def resize(k, v, order):
            return self.layout.fitted((jnp.take(k, order, axis=0), jnp.take(v, order, axis=0)), new_context)

        args = (*self.kv_specs(rows, context), self._abstract((new_rows,), jnp.int32))
        return resize, args, (), (self.kv_sharding, self.kv_sharding)


@functools.lru_cache(maxsize=256)  # traces; every layer's stages of a shape need them
def _aux_shapes(spec: ModelSpec, rows: int, width: int):
    positions = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    return jax.eval_shape(functools.partial(family(spec.family).aux, spec), positions)


def _name(kind: str, *sizes: int | str) -> str:
    return "-".join([kind, *map(str, sizes)])


def _groups(spec: ModelSpec, size: int) -> dict[Span, Span]:
    """Spans of `size` layers, the last one of the rest, each with the first whose layers are of the same kinds: they
    share a program.
    """
    spans = [Span(start, min(start + size, spec.layers)) for start in range(0, spec.layers, size)]
    kinds = [tuple(params.unit_kind(spec, layer) for layer in range(span.start, span.stop)) for span in spans]
    return {span: spans[kinds.index(alike)] for span, alike in zip(spans, kinds, strict=True)}


def _fingerprint(spec: ModelSpec, attention: Attention) -> str:
    """The spec, whatever the model is called, and our source of everything that a stage traces through."""
    files = [*sorted(map(str, Path(blocks.__file__).parent.glob("*.py"))), __file__, sampling.__file__, params.__file__,
             modules.__file__]
    sources = [Path(file).read_text("utf-8") for file in files]
    limits = f"{MAX_LOGPROBS} {MAX_LOGIT_BIAS} {MAX_STOP_TOKENS}"
    return "\n".join([repr(replace(spec, name="")), limits, attention.source(), *sources])

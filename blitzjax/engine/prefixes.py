"""Automatic prefix caching on one instance: the KV behind the page keys that the batcher knows, in host memory.

Invariant: the pages kept are those whose keys the batcher has not forgotten. A page is a pure function of the tokens
that its key stands for and of the parameters; whoever drops the parameters drops the cache.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from blitzjax.config import EngineConfig
from blitzjax.control.batching import Batcher
from blitzjax.control.prefixes import PageKey, page_keys
from blitzjax.engine.params import ALIGNMENT_BYTES
from blitzjax.engine.sequence import Sequence as Running
from blitzjax.engine.stages import KV, Stages

ROWS_IN_FLIGHT = 2  # copied from a device to the host


@dataclass(slots=True)
class _Page:
    """Keys and values [L, ...] as the layout has them, in memory of their own."""

    kv: tuple[np.ndarray, np.ndarray] | None = None
    coming: Future[None] | None = None  # what sets `kv`

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        if self.kv is None:
            assert self.coming is not None
            self.coming.result()
        assert self.kv is not None
        return self.kv


class PrefixCache:
    """Owned by the engine thread. Copies pages from the arrays of prompts and of the decode batch, and back."""

    def __init__(self, stages: Stages, batcher: Batcher, config: EngineConfig, own_memory: bool):
        """`own_memory`: what is kept is copied from the devices, see `staging.has_own_memory`."""
        self._stages, self._batcher, self._own_memory = stages, batcher, own_memory
        self._page_size, self._on = config.page_size, config.prefix_caching
        self._pages: dict[PageKey, _Page] = {}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="prefix-copies")  # from devices with memory of their own
        self._copies: collections.deque[Future[None]] = collections.deque()

    def check(self) -> None:
        """Asserts the invariant."""
        assert self._pages.keys() == self._batcher.known() | set(self._batcher.forgotten), "pages and their keys differ"

    def keys(self, sequence: Running) -> list[PageKey]:
        """Of the full pages of what the sequence has so far; none when all of its prompt must be run."""
        if not self._on or sequence.scored:
            return []
        sequence.keys = page_keys(sequence.tokens, self._page_size, sequence.keys)
        return sequence.keys

    def keep(self, sequence: Running, tokens: int, layers: Sequence[KV], row: int) -> None:
        """The first `tokens` tokens of the sequence have KV in row `row` of every layer's arrays. It keeps its seat."""
        if not self._on:
            return
        sequence.keys = page_keys(sequence.tokens, self._page_size, sequence.keys)
        keys = sequence.keys[: tokens // self._page_size]
        news = self._batcher.remember(sequence.id, keys)
        while self._batcher.forgotten:
            del self._pages[self._batcher.forgotten.pop()]
        if news:
            pages = {index: _Page() for index in news}
            self._pages |= {keys[index]: page for index, page in pages.items()}
            self._fill(pages, layers, row, tokens)

    def _fill(self, pages: dict[int, _Page], layers: Sequence[KV], row: int, tokens: int) -> None:
        """Where devices have memory of their own the row is copied there, and that to the host by a thread: steps go on."""
        stages = self._stages
        if not self._own_memory:
            self._cut(pages, [[_shards(a, stages.layout.heads) for a in kv] for kv in layers], row)
            return
        index, length = np.array([row], np.int32), stages.shapes.moved(tokens)
        layers = [(k, v) if len(k) == 1 else stages.resize(k, v, index, stages.layout.tokens((k, v))) for k, v in layers]
        parts = [[_shards(a, stages.layout.heads) for a in stages.fitted(kv, length)] for kv in layers]
        for part in [part for kv in parts for shards in kv for part in shards]:
            part.copy_to_host_async()
        while len(self._copies) >= ROWS_IN_FLIGHT:
            self._copies.popleft().result()
        self._copies.append(self._copier.submit(self._cut, pages, parts, 0))
        for page in pages.values():
            page.coming = self._copies[-1]

    def _cut(self, pages: dict[int, _Page], parts: list[list[list[Array]]], row: int) -> None:
        """`parts`: of every layer's keys and values, those of each device."""
        rows = [tuple(_joined([np.asarray(part)[row] for part in shards], self._stages.layout.heads - 1) for shards in kv)
                for kv in parts]
        for index, page in pages.items():
            keys_at, values_at = self._page(index, dims=3)
            page.kv = np.stack([k[keys_at] for k, _ in rows]), np.stack([v[values_at] for _, v in rows])

    def staged(self, sequence: Running, hit: int) -> list[KV]:
        """Every layer's staging arrays for its prompt, with the first `hit` tokens in them, which its seat owns."""
        specs = self._stages.kv_specs(1, self._stages.shapes.staging(len(sequence.tokens)))
        k, v = (_zeros((self._stages.spec.layers, *spec.shape[1:]), spec.dtype) for spec in specs)
        for index, key in enumerate(sequence.keys[: hit // self._page_size]):
            keys_at, values_at = self._page(index, dims=4)
            k[keys_at], v[values_at] = self._pages[key].read()
        sharding = self._stages.kv_sharding
        return [tuple(jax.device_put((k[layer : layer + 1], v[layer : layer + 1]), sharding)) for layer in range(len(k))]

    def _page(self, index: int, dims: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where tokens of page `index` are in keys and in values whose last dimensions, `dims` in all, are the layout's."""
        layout, at = self._stages.layout, slice(index * self._page_size, (index + 1) * self._page_size)
        keys, values = (tuple(at if i == axis + dims - 4 else slice(None) for i in range(dims))
                        for axis in (layout.keys, layout.values))
        return keys, values


def kept_pages(stages: Stages, config: EngineConfig, pages: int) -> int:
    """How many pages the prefix cache may hold: all `pages`, or those that its memory suffices for."""
    if not config.prefix_caching:
        return 0
    arrays = stages.kv_specs(1, config.page_size)
    return min(pages, config.prefix_cache_bytes // (stages.spec.layers * sum(a.size * a.dtype.itemsize for a in arrays)))


def _shards(array: Array, heads: int) -> list[Array]:
    """One of each part of an array whose axis `heads` may be sharded."""
    shards = {shard.index[heads].start or 0: shard.data for shard in array.addressable_shards}
    return [shards[start] for start in sorted(shards)]


def _joined(parts: list[np.ndarray], axis: int) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Aligned, so that a device whose memory is the host's takes it as it is; numpy asks for huge pages."""
    size, item = math.prod(shape), dtype.itemsize
    memory = np.zeros(size + ALIGNMENT_BYTES // item, dtype)
    start = -memory.ctypes.data % ALIGNMENT_BYTES // item
    return memory[start : start + size].reshape(shape)

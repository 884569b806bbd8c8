"""A mixture of experts (arXiv:2401.04088): each token's feed-forward is that of the experts its router picks.

Invariant: routing looks at one token alone and no token is ever dropped, so an answer does not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from blitzjax.models import blocks
from blitzjax.models.design import design
from blitzjax.models.parameters import matrix, small, weight
from blitzjax.types import ModelSpec

_MAX_ROWS = 32  # tokens of one expert that are multiplied at once: larger blocks are emptier on average


class Experts(nnx.Module):
    """Every device holds a slice of every expert ("ffn"), so lanes do equal work whatever the router picks."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.spec, self.design = spec, design(spec)
        count, inner, dim = self.design.experts, self.design.expert_dim, spec.dim
        self.router = weight(rngs, (count, dim), (None, "embed"), "float32")  # close calls decide: exact
        self.gate_up = matrix(rngs, (count, inner, 2, dim), (None, "ffn", None, "embed"), spec.dtype)
        self.down = matrix(rngs, (count, dim, inner), (None, "embed", "ffn"), spec.dtype)
        if self.design.expert_bias:
            self.router_bias = small((count,), (None,))
            self.gate_up_bias = small((count, inner, 2), (None, "ffn", None))
            self.down_bias = small((count, dim), (None, "embed"))
        if self.design.shared_dim:
            self.shared_gate = small((1, dim), (None, "embed"))
            self.shared_gate_up = matrix(rngs, (self.design.shared_dim, 2, dim), ("ffn", None, "embed"),
                                         spec.dtype)
            self.shared_down = matrix(rngs, (dim, self.design.shared_dim), ("embed", "ffn"), spec.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[B, T, D] → f32[B, T, D]"""
        tokens = x.reshape(-1, self.spec.dim)  # [N, D]
        chosen, weights = self._route(tokens)
        y = blocks.weighted(weights, self._apply(tokens, chosen))
        if self.design.shared_dim:
            y = y + self._shared(tokens)
        return y.reshape(x.shape)

    def _route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f32[N, D] → experts i32[N, K] and their weights f32[N, K]."""
        logits = blocks.matmul(tokens, self.router[...])  # [N, E]
        if self.design.expert_bias:
            logits = logits + self.router_bias[...]
        best, chosen = lax.top_k(logits, self.design.experts_per_token)
        if self.design.renormalize:
            return chosen, blocks.softmax(best)
        return chosen, jnp.take_along_axis(blocks.softmax(logits), chosen, axis=1)

    def _shared(self, tokens: jax.Array) -> jax.Array:
        y = blocks.matmul(blocks.gated(self.design.activation, tokens, self.shared_gate_up[...]), self.shared_down[...])
        return blocks.weighted(jax.nn.sigmoid(blocks.matmul(tokens, self.shared_gate[...])), y[:, None])

    def _apply(self, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
        """f32[N, D], i32[N, K] → what each chosen expert makes of its token, f32[N, K, D].

        The loop runs over the blocks that exist, so that weights of experts that nobody chose are never read.
        """
        plan = _lay_out(chosen, self.design.experts)
        laid_out, gate_up, down = tokens[plan.token], self.gate_up[...], self.down[...]

        def run(start: jax.Array, y: jax.Array, expert: jax.Array) -> jax.Array:
            x = lax.dynamic_slice_in_dim(laid_out, start, plan.rows)
            if self.design.expert_bias:
                inner = blocks.matmul(x, gate_up[expert]) + self.gate_up_bias[...][expert]  # [rows, F, 2]
                made = blocks.matmul(blocks.activate(self.design.activation, inner), down[expert])
                made = made + self.down_bias[...][expert]
            else:
                made = blocks.matmul(blocks.gated(self.design.activation, x, gate_up[expert]), down[expert])
            return lax.dynamic_update_slice_in_dim(y, made, start, 0)

        def step(block: jax.Array, y: jax.Array) -> jax.Array:
            # XLA:CPU widens a bfloat16 array that a loop slices to float32, whole and ahead of the loop (20x slower); it
            # does not move work out of a branch. XLA:GPU asks the device which branch it is, and copies y for it.
            def branch(start: jax.Array, y: jax.Array, owner: jax.Array) -> jax.Array:
                return lax.cond(owner < self.design.experts, run, lambda _, y, __: y, start, y, owner)  # always true

            return lax.platform_dependent(block * plan.rows, y, plan.owner[block], cpu=branch, default=run)

        return lax.fori_loop(0, plan.blocks, step, jnp.zeros_like(laid_out))[plan.row]


class _Plan(NamedTuple):
    """Pairs of a token and an expert, sorted by expert, in blocks of `rows`; each block is of one expert.

        expert   0  0  0  -  3  3  3  3  3  -  -  -  7  ...      rows = 4
        block   |  0       |  1       |  2       |  3
    """

    rows: int
    blocks: jax.Array  # i32[]: how many there are; the arrays below have room for more
    token: jax.Array  # i32[room * rows]: whose row it is; 0 where nobody's
    owner: jax.Array  # i32[room]: the expert of a block
    row: jax.Array  # i32[N, K]: where a pair is


def _lay_out(chosen: jax.Array, count: int) -> _Plan:
    """i32[N, K], each below `count` → where every pair goes. Rows per block: what spread-out tokens would fill."""
    experts, pairs = chosen.reshape(-1), chosen.size
    rows = min(max(2, 1 << (pairs // count).bit_length()), _MAX_ROWS)
    room = min(count, pairs) + pairs // rows
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=count)
    ends = jnp.cumsum(-(-sizes // rows))  # per expert: the block after its last
    shift = jnp.append(0, ends[:-1]) * rows - (jnp.cumsum(sizes) - sizes)  # from place in order to row
    row = (shift[experts[order]] + jnp.arange(pairs)).astype(jnp.int32)
    token = jnp.zeros(room * rows, jnp.int32).at[row].set(order // chosen.shape[1])
    owner = jnp.searchsorted(ends, jnp.arange(room), side="right", method="compare_all")
    return _Plan(rows, ends[-1], token, owner, jnp.zeros(pairs, jnp.int32).at[order].set(row).reshape(chosen.shape))

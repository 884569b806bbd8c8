"""How the next token is drawn from logits, on the device, in stages behind the head's.

Order, as in vLLM: minimum length and logit bias, penalties, grammar, temperature, min-p, top-k, top-p, one draw.
Invariant: a row's token depends only on its own logits, parameters, seed and history; never on its neighbours, nor on
where or in which attempt the tokens before it were drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from blitzjax.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, ModelSpec, Sampling, TokenLogprob

_ALL = np.uint32(0xFFFFFFFF)  # 32 tokens that are allowed
_BLOCK = 64  # tokens of which one is searched or drawn at once
_NEAR = 256  # most draws end among these; finding them in 49152 takes 0.2 ms a row, bisection 1.8 (one CPU core)


class Edits(NamedTuple):
    """What changes logits before the draw, and whose logprobs are wanted. One row per sequence; NumPy on the way in."""

    repetition: np.ndarray  # f32[rows]; 1 is off
    presence: np.ndarray  # f32[rows]; 0 is off
    frequency: np.ndarray  # f32[rows]; 0 is off
    history: np.ndarray  # i32[rows, context], prompt and answer of penalised rows; the rest is `vocab`, no token
    prompt: np.ndarray  # i32[rows]; history[:prompt] is the prompt
    bias_ids: np.ndarray  # i32[rows, biases], padded with `vocab`
    bias: np.ndarray  # f32[rows, biases]
    logprobs: np.ndarray  # bool[rows]
    allowed: np.ndarray  # u32[rows, (vocab + 31) // 32]; bit t % 32 of word t // 32 is token t's

    def set(self, row: int, sampling: Sampling, step: int, history: np.ndarray, eos: tuple[int, ...],
            allowed: np.ndarray | None = None) -> None:
        """Row `row` draws token `step` of an answer; before `min_tokens` no stop token and, as in vLLM, none of `eos`
        either, ignored or not. `history` i32[prompt + step] is read for penalised rows only. `allowed` u32[words] is what
        a grammar leaves; it knows of the minimum length.
        """
        self.logprobs[row] = sampling.logprobs >= 0
        if penalised(sampling):
            self.repetition[row] = sampling.repetition_penalty
            self.presence[row], self.frequency[row] = sampling.presence_penalty, sampling.frequency_penalty
            self.history[row, : len(history)], self.prompt[row] = history, len(history) - step
        biases = [(b.token_id, b.bias) for b in sampling.logit_bias]
        if allowed is not None:
            self.allowed[row] = allowed
        elif step < sampling.min_tokens:
            biases += [(token, -np.inf) for token in (*sampling.stop_token_ids, *eos)]
        for i, pair in enumerate(biases):
            self.bias_ids[row, i], self.bias[row, i] = pair


class Draws(NamedTuple):
    """One row per sequence; NumPy on the way in. Rows that are not set are greedy."""

    temperature: np.ndarray  # f32[rows]; 0 is greedy
    top_k: np.ndarray  # i32[rows]; 0 is off
    top_p: np.ndarray  # f32[rows]; 1 is off
    min_p: np.ndarray  # f32[rows]; 0 is off
    seed: np.ndarray  # u32[rows, 2]
    step: np.ndarray  # i32[rows], index of the token in the answer
    edits: Edits | None = None  # no row asks for any

    @property
    def greedy(self) -> bool:
        return not self.temperature.any()

    def set(self, row: int, sampling: Sampling, step: int) -> None:
        """Row `row` draws token `step` of an answer. Edits are set apart."""
        if sampling.temperature == 0:
            return
        self.temperature[row], self.top_k[row], self.top_p[row] = sampling.temperature, sampling.top_k, sampling.top_p
        self.min_p[row] = sampling.min_p
        self.seed[row] = (sampling.seed >> 32 & 0xFFFFFFFF, sampling.seed & 0xFFFFFFFF)
        self.step[row] = step


class Drawn(NamedTuple):
    """What a head gave back, in one copy."""

    tokens: np.ndarray  # i32[rows]
    details: np.ndarray | None  # i32[rows, ...] from `describe`, when the draws had edits

    def logprobs(self, row: int, top: int) -> tuple[TokenLogprob, ...]:
        """Of the token drawn in `row`, with the `top` likeliest; nothing for a negative `top`."""
        if top < 0:
            return ()
        assert self.details is not None
        return (token_logprob(self.details[row], top),)


def greedy_draws(rows: int) -> Draws:
    zero = np.zeros(rows, np.float32)
    return Draws(zero, np.zeros(rows, np.int32), np.ones(rows, np.float32), zero.copy(), np.zeros((rows, 2), np.uint32),
                 np.zeros(rows, np.int32))


def no_edits(rows: int, spec: ModelSpec, context: int) -> Edits:
    """Rows of histories up to `context` tokens, all off."""
    zero, biases = np.zeros(rows, np.float32), MAX_LOGIT_BIAS + MAX_STOP_TOKENS + len(spec.eos_token_ids)
    return Edits(np.ones(rows, np.float32), zero, zero.copy(), np.full((rows, context), spec.vocab, np.int32),
                 np.zeros(rows, np.int32), np.full((rows, biases), spec.vocab, np.int32),
                 np.zeros((rows, biases), np.float32), np.zeros(rows, np.bool_),
                 np.full((rows, mask_words(spec.vocab)), _ALL, np.uint32))


def mask_words(vocab: int) -> int:
    """uint32 words that have a bit for each token."""
    return (vocab + 31) // 32


def edits_until(sampling: Sampling) -> float:
    """The first token of an answer that can be drawn without Edits."""
    always = sampling.logprobs >= 0 or bool(sampling.logit_bias or sampling.grammar) or penalised(sampling)
    return math.inf if always else sampling.min_tokens


def penalised(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def end_tokens(sampling: Sampling, spec: ModelSpec) -> tuple[int, ...]:
    """Tokens that end an answer."""
    return sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *spec.eos_token_ids)


# ---- on the device ---------------------------------------------------------------------------------------------------


def greedy(logits: Array) -> Array:
    """Index of the largest logit, lowest index first: the first block that has it, then the first in there. On XLA:CPU
    argmax, or a second look at all of them, takes several times as long. [rows]
    """
    blocks = _padded(logits).reshape(logits.shape[0], -1, _BLOCK)
    best = lax.optimization_barrier(blocks.max(-1))
    block = _first_largest(best)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block * _BLOCK + _first_largest(inside), logits.shape[1] - 1)


def _first_largest(x: Array) -> Array:
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.minimum(jnp.where(x == x.max(-1, keepdims=True), ids, x.shape[1]).min(-1), x.shape[1] - 1)


def _padded(x: Array) -> Array:
    """With -inf, to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=-jnp.inf)


def sample(logits: Array, draws: Draws) -> Array:
    """Greedy rows as they are; others by temperature, filters, then Gumbel-max with the row's own noise. i32[rows]"""
    best = greedy(logits)
    drawn = lax.cond(jnp.any(draws.temperature > 0), lambda _, *of: _draw(*of), lambda best, *_: best, best, logits, draws)
    return jnp.where(draws.temperature > 0, drawn, best)


def _draw(logits: Array, draws: Draws) -> Array:
    """From the likeliest tokens in rows whose filters keep no others, from the whole vocabulary in the rest: skipped when
    there is no such row. Which way a row goes depends on that row alone.
    """
    x = logits / jnp.maximum(draws.temperature, 1e-6)[:, None]
    filtered = _filtered(draws)
    none = (jnp.zeros(x.shape[0], jnp.int32), jnp.zeros(x.shape[0], jnp.bool_))
    near, done = lax.cond(jnp.any(filtered), _draw_near, lambda *_: none, x, draws)
    done &= filtered  # others are drawn differently there, and would be for their neighbours' sake
    off = {"top_k": jnp.where(done, 0, draws.top_k), "top_p": jnp.where(done, 1.0, draws.top_p),
           "min_p": jnp.where(done, 0.0, draws.min_p)}
    rest = draws._replace(**off)  # type: ignore[arg-type]  # what was NumPy on the way in is jax's here
    return lax.cond(jnp.all(done | (draws.temperature == 0)), lambda near, *_: near,
                    lambda near, x, rest: jnp.where(done, near, _draw_far(x, rest)), near, x, rest)


def _draw_near(x: Array, draws: Draws) -> tuple[Array, Array]:
    """→ tokens, and the rows whose filters keep none but those looked at."""
    ids, kept, whole = likeliest(x, draws)
    best = (kept + _noise(draws, ids)).argmax(-1, keepdims=True)
    return jnp.take_along_axis(ids, best, axis=1)[:, 0], whole


def _draw_far(x: Array, draws: Draws) -> Array:
    """First one of the groups that `masses` adds up, then a token of it: of all tokens that takes one exp each, where noise
    for each would be twenty rounds of a hash and two logarithms.
    """
    x = lax.cond(jnp.any(_filtered(draws)), keep, lambda x, _: x, x, draws)
    mass = masses(x)
    groups, vocab = mass.shape[1], x.shape[1]
    every = lax.broadcasted_iota(jnp.int32, mass.shape, 1)
    group = _first_largest(jnp.log(mass) + _noise(draws, vocab + every))[:, None]
    ids = group + groups * lax.broadcasted_iota(jnp.int32, (x.shape[0], _BLOCK), 1)
    inside = jnp.take_along_axis(x, ids, axis=1, mode="fill", fill_value=-jnp.inf)
    best = _first_largest(inside + _noise(draws, ids))[:, None]
    return jnp.take_along_axis(ids, best, axis=1)[:, 0]


def masses(x: Array) -> Array:
    """exp(x - max), added up over tokens g, g + groups, g + 2 groups, ...: f32[rows, groups].

    In an order that is written out: how XLA orders a sum depends on the number of rows.
    """
    mass = jnp.exp(_padded(x) - x.max(-1, keepdims=True))
    groups = mass.shape[1] // _BLOCK
    while mass.shape[1] > groups:
        half = mass.shape[1] // 2
        mass = mass[:, :half] + mass[:, half:]
    return lax.optimization_barrier(mass)


def _noise(draws: Draws, ids: Array) -> Array:
    """Gumbel noise that a row's seed and step give to each of i32[rows, n]: tokens, and behind them groups."""

    def bits(seed, step, ids):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
        return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i))[0])(ids)

    uniform = ((jax.vmap(bits)(draws.seed, draws.step, ids) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # in (0, 1)
    return -jnp.log(-jnp.log(uniform))


def described(logits: Array, tokens: Array, wanted: Array) -> Array:
    """What `describe` says of each row's token, by the logits before edits; only the token is filled in when no row
    wants logprobs.
    """
    top = min(MAX_LOGPROBS, logits.shape[1])
    return lax.cond(jnp.any(wanted), describe,
                    lambda _, tokens: jnp.pad(tokens[:, None], ((0, 0), (0, 2 + 2 * top))), logits, tokens)


def edit(logits: Array, edits: Edits) -> Array:
    """Bias, then penalties, then what a grammar allows. f32[rows, vocab]"""
    row = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[row, edits.bias_ids].add(edits.bias, mode="drop")
    wanted = jnp.any((edits.repetition != 1) | (edits.presence != 0) | (edits.frequency != 0))
    logits = lax.cond(wanted, _penalise, lambda x, _: x, logits, edits)
    return lax.cond(jnp.any(edits.allowed != _ALL), _mask, lambda x, _: x, logits, edits.allowed)


def _mask(logits: Array, allowed: Array) -> Array:
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1  # [rows, words, 32]
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def _penalise(logits: Array, edits: Edits) -> Array:
    """Repetition as in CTRL (arXiv:1909.05858, section 4.1) over prompt and answer; presence and frequency as in
    OpenAI's API, over the answer.
    """
    row = jnp.arange(logits.shape[0])[:, None]
    answered = jnp.arange(edits.history.shape[1])[None] >= edits.prompt[:, None]  # [rows, context]
    seen = jnp.zeros(logits.shape, jnp.bool_).at[row, edits.history].set(True, mode="drop")
    counts = jnp.zeros(logits.shape).at[row, edits.history].add(answered.astype(jnp.float32), mode="drop")
    repetition = edits.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - edits.frequency[:, None] * counts - edits.presence[:, None] * (counts > 0)


def _filtered(draws: Draws) -> Array:
    return (draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)  # type: ignore[return-value]  # jax's, in a jit


def likeliest(x: Array, draws: Draws) -> tuple[Array, Array, Array]:
    """The largest of each row: ids i32[rows, n], x f32[rows, n] with -inf for what `keep` leaves out; and bool[rows],
    whether that is all that `keep` keeps. Other rows are not to be used.
    """
    count = min(_NEAR, x.shape[1])
    best, ids = lax.top_k(x, count)
    best = lax.optimization_barrier(best)  # XLA:CPU sorts the whole row when it sees the slices below
    least = best[:, 0] + jnp.log(draws.min_p)  # [rows], of what is kept so far
    known = (draws.top_k <= count) | (least > best[:, -1])  # else top-p is a share of tokens that are not all here
    kth = jnp.take_along_axis(best, jnp.clip(draws.top_k - 1, 0, count - 1)[:, None], axis=1)[:, 0]
    least = jnp.maximum(least, jnp.where(draws.top_k > 0, kth, -jnp.inf))
    mass = jnp.where(x >= least[:, None], jnp.exp(x - best[:, :1]), 0).sum(-1)
    p = jnp.where(best >= least[:, None], jnp.exp(best - best[:, :1]), 0) / mass[:, None]
    enough = jnp.cumsum(p, axis=1) - p < draws.top_p[:, None]  # the token is needed to reach top_p
    last = jnp.where(enough, best, jnp.inf).min(-1)
    least = jnp.maximum(least, jnp.where(draws.top_p < 1, last, -jnp.inf))
    ruled_out = best[:, -1] == -jnp.inf  # and so are all outside
    whole = known & (least > best[:, -1]) | ruled_out | (count == x.shape[1])  # a tie with the last may have others outside
    return ids, jnp.where(best >= least[:, None], best, -jnp.inf), whole


def keep(x: Array, draws: Draws) -> Array:
    """Sets to -inf what min-p, then top-k, then top-p over what is left, leave out. f32[rows, vocab]"""
    x = jnp.where(x >= x.max(-1, keepdims=True) + jnp.log(draws.min_p)[:, None], x, -jnp.inf)
    bisected = jnp.any((draws.top_k > 0) | (draws.top_p < 1))
    return lax.cond(bisected, _bisect, lambda x, *_: x, x, draws.top_k, draws.top_p)


def _bisect(x: Array, top_k: Array, top_p: Array) -> Array:
    """Exact thresholds over the whole vocabulary, without a sort."""
    order = _ordered_bits(x)  # [rows, vocab]
    k = jnp.where(top_k > 0, top_k, x.shape[1])
    in_k = order >= _largest(lambda t: (order >= t[:, None]).sum(-1) >= k, x.shape[0])[:, None]
    x = jnp.where(in_k, x, -jnp.inf)
    p = jax.nn.softmax(x, axis=-1)
    mass = jnp.where(top_p < 1, top_p, 2.0)  # 2: unreachable, keeps everything
    enough = _largest(lambda t: jnp.where(order >= t[:, None], p, 0).sum(-1) >= mass, x.shape[0])
    return jnp.where(order >= enough[:, None], x, -jnp.inf)


def _ordered_bits(x: Array) -> Array:
    """uint32 that sorts like the float32 it came from."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, rows: int) -> Array:
    """Largest uint32 threshold per row for which the monotone predicate holds; 0 when it never does."""

    def step(i, low):
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 32, step, jnp.zeros(rows, jnp.uint32))


def describe(logits: Array, tokens: Array) -> Array:
    """i32[rows, 3 + 2 N]: token, rank, bits of its logprob, the N likeliest tokens, bits of their logprobs."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [rows, 1]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = 1 + (logits > chosen).sum(-1, keepdims=True, dtype=jnp.int32)
    best, ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    return jnp.concatenate([tokens[:, None], rank, _bits(chosen - total), ids, _bits(best - total)], axis=1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def token_logprob(described: np.ndarray, top: int) -> TokenLogprob:
    """One row from `describe`, on the host, cut to the `top` likeliest."""
    count = (len(described) - 3) // 2
    ids, logprobs = described[3 : 3 + count], described[3 + count :].view(np.float32)
    return TokenLogprob(float(described[2:3].view(np.float32)[0]), int(described[1]), tuple(ids[:top].tolist()),
                        tuple(logprobs[:top].tolist()))

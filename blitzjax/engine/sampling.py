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
_FEW = 64  # the largest top-k by which tokens are drawn from the likeliest alone; most checkpoints ask for 20 to 64
_MANY = 256  # the largest top-k for which this many likeliest are found faster than a threshold
_TIES = 8  # tokens that may be as likely as the last of them


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


def _padded(x: Array, value: float = -jnp.inf) -> Array:
    """To whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=value)


def sample(logits: Array, draws: Draws) -> Array:
    """Greedy rows as they are; others by temperature, filters, then Gumbel-max with the row's own noise. i32[rows]"""
    best = greedy(logits)
    drawn = lax.cond(jnp.any(draws.temperature > 0), lambda _, *of: _draw(*of), lambda best, *_: best, best, logits, draws)
    return jnp.where(draws.temperature > 0, drawn, best)


def _draw(logits: Array, draws: Draws) -> Array:
    """From the likeliest tokens in rows whose top-k says how few they are, from the whole vocabulary in the rest: skipped
    when there is no such row. Which way a row goes depends on that row alone.
    """
    x = logits / jnp.maximum(draws.temperature, 1e-6)[:, None]
    few = (draws.top_k > 0) & (draws.top_k <= _FEW)
    none = (jnp.zeros(x.shape[0], jnp.int32), jnp.zeros(x.shape[0], jnp.bool_))
    near, done = lax.cond(jnp.any(few), _draw_near, lambda *_: none, x, draws)
    done &= few  # others are drawn differently there, and would be for their neighbours' sake
    off = {"top_k": jnp.where(done, 0, draws.top_k), "top_p": jnp.where(done, 1.0, draws.top_p),
           "min_p": jnp.where(done, 0.0, draws.min_p)}
    rest = draws._replace(**off)  # type: ignore[arg-type]  # what was NumPy on the way in is jax's here
    return lax.cond(jnp.all(done | (draws.temperature == 0)), lambda near, *_: near,
                    lambda near, x, rest: jnp.where(done, near, _draw_far(x, rest)), near, x, rest)


def _draw_near(x: Array, draws: Draws) -> tuple[Array, Array]:
    """→ tokens, and the rows whose filters keep none but those looked at."""
    ids, kept, whole = keep_few(x, draws)
    best = _first_largest(kept + _noise(draws, ids))[:, None]
    return jnp.take_along_axis(ids, best, axis=1)[:, 0], whole


def _draw_far(x: Array, draws: Draws) -> Array:
    """First one of the groups that `masses` adds up, then a token of it: of all tokens that takes one exp each, where noise
    for each would be twenty rounds of a hash and two logarithms.

    Top-p by rejection: a token is kept when those likelier than it weigh less than top-p of all. If it is not, neither are
    those less likely, and the next is drawn from what remains, of which `masses` is known by then.
    """
    wanted = jnp.any((draws.top_k > 0) | (draws.min_p > 0))
    x = lax.cond(wanted, keep, lambda x, _: x, x, draws)
    top = x.max(-1, keepdims=True)
    mass = masses(x, top)
    share = draws.top_p * _total(mass)  # [rows]

    def attempt(state):
        count, token, floor, mass, drawn = state
        fresh = _draw_grouped(x, floor, mass, draws, count)
        token = jnp.where(drawn, token, fresh)
        floor = jnp.where(drawn, floor, jnp.take_along_axis(x, token[:, None], axis=1)[:, 0])
        open_ = (draws.top_p < 1) & ~drawn
        mass = lax.cond(jnp.any(open_), lambda floor, _: masses(jnp.where(x > floor[:, None], x, -jnp.inf), top),
                        lambda _, mass: mass, floor, mass)
        above = _total(mass)
        drawn = ~(open_ & (above >= share) & (above > 0))  # also where logits are no numbers, or a share is none
        return count + 1, token, floor, mass, drawn

    rows = x.shape[0]
    begun = (jnp.int32(0), jnp.zeros(rows, jnp.int32), jnp.full(rows, -jnp.inf), mass, jnp.zeros(rows, jnp.bool_))
    return lax.while_loop(lambda state: ~jnp.all(state[-1]), attempt, begun)[1]


def _draw_grouped(x: Array, floor: Array, mass: Array, draws: Draws, attempt: Array) -> Array:
    """A token above f32[rows] `floor`; `mass` is what those weigh."""
    groups, vocab = mass.shape[1], x.shape[1]
    new = attempt * (vocab + groups)  # noise of this attempt
    every = lax.broadcasted_iota(jnp.int32, mass.shape, 1)
    group = _first_largest(jnp.log(mass) + _noise(draws, new + vocab + every))[:, None]
    ids = group + groups * lax.broadcasted_iota(jnp.int32, (x.shape[0], _BLOCK), 1)
    inside = jnp.take_along_axis(x, ids, axis=1, mode="fill", fill_value=-jnp.inf)
    inside = jnp.where(inside > floor[:, None], inside, -jnp.inf)
    best = _first_largest(inside + _noise(draws, new + ids))[:, None]
    return jnp.take_along_axis(ids, best, axis=1)[:, 0]


def masses(x: Array, top: Array) -> Array:
    """exp(x - top), added up over tokens g, g + groups, g + 2 groups, ...: f32[rows, groups]."""
    return _added_up(jnp.exp(_padded(x) - top))


def _added_up(x: Array) -> Array:
    """f32[rows, 64 n] → f32[rows, n], in a written-out order: how XLA orders a sum depends on the number of rows."""
    groups = x.shape[1] // _BLOCK
    while x.shape[1] > groups:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return lax.optimization_barrier(x)


def _total(mass: Array) -> Array:
    """[rows]"""
    while mass.shape[1] > 1:
        mass = _added_up(_padded(mass, 0.0))
    return mass[:, 0]


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


def likeliest(x: Array, count: int) -> tuple[Array, Array]:
    """lax.top_k, in a fraction of its time: the largest are in the blocks that have the largest. f32[rows, n], i32[rows, n]"""
    rows, count = x.shape[0], min(count, x.shape[1])
    blocks = _padded(x).reshape(rows, -1, _BLOCK)
    best = lax.optimization_barrier(blocks.max(-1))
    _, which = lax.top_k(best, min(count, best.shape[1]))
    which = jnp.sort(lax.optimization_barrier(which), axis=-1)  # of equal ones the first comes first
    inside = lax.optimization_barrier(jnp.take_along_axis(blocks, which[:, :, None], axis=1).reshape(rows, -1))
    largest, at = map(lax.optimization_barrier, lax.top_k(inside, count))  # XLA:CPU sorts all when it sees a slice of these
    return largest, jnp.take_along_axis(which, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK


def keep_few(x: Array, draws: Draws) -> tuple[Array, Array, Array]:
    """In rows whose top-k is at most _FEW: ids i32[rows, n] of the likeliest, x f32[rows, n] with -inf for what min-p, then
    top-k, then top-p leave out; and bool[rows], whether that is all that they keep.
    """
    best, ids = likeliest(x, _FEW + _TIES)
    top, last = best[:, :1], best[:, -1]
    kth = jnp.take_along_axis(best, jnp.clip(draws.top_k - 1, 0, best.shape[1] - 1)[:, None], axis=1)
    least = jnp.maximum(top + jnp.log(draws.min_p)[:, None], kth)
    whole = (least[:, 0] > last) | (last == -jnp.inf) | (best.shape[1] == x.shape[1])  # others may be as likely as the last
    mass = jnp.where(best >= least, jnp.exp(best - top), 0)
    width = 1
    while width < mass.shape[1]:  # what a token and those before it weigh, added up in an order that is written out
        mass, width = mass + jnp.pad(mass, ((0, 0), (width, 0)))[:, : mass.shape[1]], 2 * width
    before = jnp.pad(mass, ((0, 0), (1, 0)))[:, :-1]
    enough = jnp.where(before < draws.top_p[:, None] * mass[:, -1:], best, jnp.inf).min(-1, keepdims=True)
    least = jnp.where(draws.top_p[:, None] < 1, jnp.maximum(least, enough), least)
    return ids, jnp.where(best >= least, best, -jnp.inf), whole


def keep(x: Array, draws: Draws) -> Array:
    """Sets to -inf what min-p, then top-k, leave out. f32[rows, vocab]"""
    x = jnp.where(x >= x.max(-1, keepdims=True) + jnp.log(draws.min_p)[:, None], x, -jnp.inf)
    return lax.cond(jnp.any(draws.top_k > 0), _keep_k, lambda x, _: x, x, draws.top_k)


def _keep_k(x: Array, top_k: Array) -> Array:
    kth = lax.cond(jnp.all(top_k <= _MANY), _kth_of_many, _kth, x, top_k)[:, None]
    return jnp.where((x >= kth) | (top_k[:, None] <= 0), x, -jnp.inf)


def _kth_of_many(x: Array, top_k: Array) -> Array:
    largest, _ = likeliest(x, _MANY)
    return jnp.take_along_axis(largest, jnp.clip(top_k - 1, 0, largest.shape[1] - 1)[:, None], axis=1)[:, 0]


def _kth(x: Array, top_k: Array) -> Array:
    """By bisection, without a sort."""
    order = _ordered_bits(x)  # [rows, vocab]
    kth = _largest(lambda t: (order >= t[:, None]).sum(-1) >= top_k, x.shape[0])
    return jnp.where(order >= kth[:, None], x, jnp.inf).min(-1)


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
    best, ids = likeliest(logits, MAX_LOGPROBS)
    return jnp.concatenate([tokens[:, None], rank, _bits(chosen - total), ids, _bits(best - total)], axis=1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def token_logprob(described: np.ndarray, top: int) -> TokenLogprob:
    """One row from `describe`, on the host, cut to the `top` likeliest."""
    count = (len(described) - 3) // 2
    ids, logprobs = described[3 : 3 + count], described[3 + count :].view(np.float32)
    return TokenLogprob(float(described[2:3].view(np.float32)[0]), int(described[1]), tuple(ids[:top].tolist()),
                        tuple(logprobs[:top].tolist()))

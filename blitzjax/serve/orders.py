"""What may be asked: turns a GenerateRequest into an Order, or says which limit it passes.

Invariant: an Order can be served as it is by any instance; workers check nothing.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import Callable

from blitzjax.control.prefixes import beginnings
from blitzjax.errors import InvalidRequest
from blitzjax.serve.answers import Order
from blitzjax.serve.chats import grammars_of, parser_of, render
from blitzjax.serve.constraints import grammar_of, grammar_of_calls
from blitzjax.serve.model import ServedModel
from blitzjax.serve.tokenizer import Tokenizer
from blitzjax.types import (DEFAULT_MAX_TOKENS, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, LogitBias, Sampling,
                            ToolCallParser)
from blitzjax.v1 import inference_pb2 as pb

MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
MAX_PENALTY = 2.0  # presence and frequency; OpenAI's limit
MAX_BIAS = 100.0  # OpenAI's limit
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_ID_CHARS = 256
_MAX_TOKEN_CHARS = 256  # no vocabulary has a longer token, but for runs of spaces
_LONG_TEXT_CHARS = 4096  # longer texts are rendered and tokenized outside the event loop
_WITH_DEFAULTS = (  # fields of Sampling that a request may leave to its defaults
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs")

_OFF = ("top_k", "seed")  # -1 is like none, as in vLLM


async def order_of(request: pb.GenerateRequest, model: ServedModel, context_tokens: int, page_size: int,
                   parser: ToolCallParser = "auto") -> Order:
    """Raises InvalidRequest. `context_tokens` bounds prompt and answer together; `page_size` is that of prefix caches,
    0 if instances have none to choose by; `parser` as configured.
    """
    if len(request.request_id) > MAX_ID_CHARS:
        raise InvalidRequest(f"request_id may have {MAX_ID_CHARS} characters, got {len(request.request_id)}")
    sampling = request.sampling
    _check_sampling(sampling, model.spec.vocab)
    if sampling.stop and model.tokenizer is None:
        raise InvalidRequest("this model has no tokenizer, so stop strings cannot be found; use stop_token_ids")
    if sampling.WhichOneof("constraint") and model.tokenizer is None:
        raise InvalidRequest("this model has no tokenizer, so its answers cannot follow a schema, a grammar or choices")
    prompt, text = await prompt_of(request, model, context_tokens)
    grammar, calls = await grammar_of(sampling), ""
    if model.tokenizer is not None:
        calls = parser_of(request.chat, model.tokenizer, parser)
    if model.tokenizer is not None and (request.chat.must_call or calls and grammar):
        either = grammars_of(request.chat, calls, model.tokenizer)
        grammar = await grammar_of_calls(*either, "" if request.chat.must_call else grammar)
    cacheable = page_size > 0 and not sampling.HasField("prompt_logprobs")
    return Order(
        request_id=request.request_id or uuid.uuid4().hex, model=model.name, prompt=prompt,
        sampling=_sampling(sampling, len(prompt), context_tokens, grammar), stop=tuple(sampling.stop),
        priority=request.priority, n=sampling.n if sampling.HasField("n") else 1, echo=text if sampling.echo else None,
        tool_call_parser=calls, beginnings=beginnings(prompt, page_size) if cacheable else ())


async def prompt_of(request: pb.GenerateRequest, model: ServedModel, context_tokens: int) -> tuple[tuple[int, ...], str]:
    """Token ids, and what to echo: the text as it was sent or rendered, else decoded.

    Raises InvalidRequest, before anything is done with a prompt that can by no means be as short as `context_tokens`.
    """
    tokenizer = model.tokenizer
    match request.WhichOneof("input"):
        case "tokens":
            _check_length(len(request.tokens.ids), "tokens", context_tokens)
            ids = tuple(request.tokens.ids)
            _check_ids(ids, model.spec.vocab)
            text = ""
            if tokenizer is not None and request.sampling.echo:
                text = tokenizer.decode(ids).rstrip("\ufffd")  # the answer completes a character
        case None:
            raise InvalidRequest("no input: set text, tokens or chat")
        case _ if tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; send tokens instead of text or chat")
        case "text":
            text = request.text
            ids = await _encode(tokenizer.encode, text, context_tokens) if text else ()
        case "chat":
            text = await _rendered(request.chat, tokenizer, context_tokens)
            ids = await _encode(tokenizer.encode_rendered, text, context_tokens)
    if not ids:
        raise InvalidRequest("the prompt is empty; it needs at least 1 token")
    _check_ids(ids, model.spec.vocab)  # a tokenizer may know tokens that the model has no embedding of
    return ids, text


async def _rendered(chat: pb.Chat, tokenizer: Tokenizer, context_tokens: int) -> str:
    """Its template says something of every message and tool."""
    size, parts = chat.ByteSize(), len(chat.messages) + len(chat.tools)
    _check_length(size, "bytes", context_tokens)
    _want(parts <= context_tokens, f"the chat has {parts} messages and tools, more than the context of {context_tokens} "
                                   "tokens can hold")
    return render(chat, tokenizer) if size < _LONG_TEXT_CHARS else await asyncio.to_thread(render, chat, tokenizer)


def _check_ids(ids: tuple[int, ...], vocab: int) -> None:
    for token in (min(ids), max(ids)) if ids else ():
        _want(0 <= token < vocab, f"token id {token} is outside the vocabulary [0, {vocab})")


async def _encode(encode: Callable[[str], tuple[int, ...]], text: str, context_tokens: int) -> tuple[int, ...]:
    _check_length(len(text), "characters", context_tokens)
    return encode(text) if len(text) < _LONG_TEXT_CHARS else await asyncio.to_thread(encode, text)


def _check_length(length: int, of: str, context_tokens: int) -> None:
    _want(length <= context_tokens * _MAX_TOKEN_CHARS,
          f"the prompt has {length} {of}, far more than the context of {context_tokens} tokens can hold")


def _check_sampling(s: pb.SamplingParams, vocab: int) -> None:
    _check_draw(s)
    _check_penalties(s, vocab)
    _check_end(s, vocab)
    for name in ("logprobs", "prompt_logprobs"):
        _want(0 <= getattr(s, name) <= MAX_LOGPROBS, f"{name} must be in [0, {MAX_LOGPROBS}], got {getattr(s, name)}")


def _check_draw(s: pb.SamplingParams) -> None:
    _want(math.isfinite(s.temperature) and 0 <= s.temperature <= MAX_TEMPERATURE,
          f"temperature must be in [0, {MAX_TEMPERATURE:g}], got {s.temperature:g}")
    _want(not s.HasField("top_p") or 0 < s.top_p <= 1, f"top_p must be in (0, 1], got {s.top_p:g}")
    _want(s.top_k >= -1, f"top_k must be at least 1, or 0 or -1 (off), got {s.top_k}")
    _want(0 <= s.min_p <= 1, f"min_p must be in [0, 1], got {s.min_p:g}")
    _want(not s.HasField("n") or 1 <= s.n <= MAX_N, f"n must be in [1, {MAX_N}], got {s.n}")
    _want(s.n <= 1 or s.temperature > 0, f"n={s.n} greedy answers would be the same; set a temperature above 0")


def _check_penalties(s: pb.SamplingParams, vocab: int) -> None:
    _want(not s.HasField("repetition_penalty") or 0 < s.repetition_penalty <= MAX_REPETITION_PENALTY,
          f"repetition_penalty must be in (0, {MAX_REPETITION_PENALTY:g}], got {s.repetition_penalty:g}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(s, name)
        _want(-MAX_PENALTY <= value <= MAX_PENALTY,
              f"{name} must be in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], got {value:g}")
    _want(len(s.logit_bias) <= MAX_LOGIT_BIAS,
          f"logit_bias may have {MAX_LOGIT_BIAS} tokens, got {len(s.logit_bias)}")
    for token, bias in s.logit_bias.items():
        _want(0 <= token < vocab, f"logit_bias: token id {token} is outside the vocabulary [0, {vocab})")
        _want(-MAX_BIAS <= bias <= MAX_BIAS,
              f"logit_bias of token id {token} must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}], got {bias:g}")


def _check_end(s: pb.SamplingParams, vocab: int) -> None:
    _want(not s.HasField("max_tokens") or s.max_tokens >= 1, f"max_tokens must be at least 1, got {s.max_tokens}")
    _want(s.min_tokens >= 0, f"min_tokens must be at least 0, got {s.min_tokens}")
    _want(len(s.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} stop strings, got {len(s.stop)}")
    _want(all(s.stop), "a stop string is empty; each needs at least 1 character")
    longest = max(map(len, s.stop), default=0)
    _want(longest <= MAX_STOP_CHARS, f"a stop string may have {MAX_STOP_CHARS} characters, got {longest}")
    _want(len(s.stop_token_ids) <= MAX_STOP_TOKENS,
          f"at most {MAX_STOP_TOKENS} stop_token_ids, got {len(s.stop_token_ids)}")
    for token in s.stop_token_ids:
        _want(0 <= token < vocab, f"stop token id {token} is outside the vocabulary [0, {vocab})")


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidRequest(message)


def _sampling(s: pb.SamplingParams, prompt_tokens: int, context_tokens: int, grammar: str) -> Sampling:
    """Fills defaults; draws a seed when there is none. Raises InvalidRequest when the answer does not fit."""
    room = context_tokens - prompt_tokens
    unsaid = max(1, room if s.fill_context else min(DEFAULT_MAX_TOKENS, room))
    wanted = s.max_tokens if s.HasField("max_tokens") else unsaid
    _want(wanted <= room, f"prompt ({prompt_tokens} tokens) + max_tokens ({wanted}) = {prompt_tokens + wanted} "
                          f"exceeds the context of {context_tokens} tokens")
    _want(s.min_tokens <= wanted, f"min_tokens must be at most max_tokens ({wanted}), got {s.min_tokens}")
    given = {name: getattr(s, name) for name in _WITH_DEFAULTS if s.HasField(name)}
    given = {name: value for name, value in given.items() if name not in _OFF or value != -1}
    bias = tuple(LogitBias(token, value) for token, value in sorted(s.logit_bias.items()))
    return Sampling(**{"seed": secrets.randbits(31), **given, "max_tokens": wanted, "logit_bias": bias,
                       "stop_token_ids": tuple(s.stop_token_ids), "grammar": grammar})

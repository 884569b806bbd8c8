"""How does an answer look in OpenAI's JSON, whole or streamed, and what else do its clients read?

Invariant: the pieces of a stream add up to the whole.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from blitzjax.errors import BlitzError, brief
from blitzjax.serve import tools
from blitzjax.serve.asking import JSON, Chunk, Result
from blitzjax.serve.openai import Asked
from blitzjax.v1 import inference_pb2 as pb

_STATUS: Mapping[str, tuple[int, str]] = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"), "NOT_FOUND": (404, "not_found_error"),
    "UNAUTHENTICATED": (401, "authentication_error"), "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "UNAVAILABLE": (503, "service_unavailable_error"), "DEADLINE_EXCEEDED": (504, "timeout_error")}


@dataclass(slots=True)
class Reply:
    """What is sent back for one body: whole, or piece by piece."""

    asked: Asked
    model: str
    id: str  # of the HTTP request; answers carry it behind what they are
    created: int = field(default_factory=lambda: int(time.time()))
    _told: dict[int, _Told] = field(default_factory=dict)  # by index of the choice

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.asked.chat else 'cmpl'}-{self.id}"

    def whole(self, results: Sequence[Sequence[Result]]) -> JSON:
        """`results`: those of each prompt."""
        choices = [self._choice(number, result) for number, of_prompt in enumerate(results) for result in of_prompt]
        usages = [[result.usage for result in of_prompt] for of_prompt in results]
        if self.asked.chat:
            return self._envelope("chat.completion", choices) | self._prompt_ids(0, results[0][0]) | {"usage": _usage(usages)}
        return self._envelope("text_completion", choices) | {"usage": _usage(usages)}

    def piece(self, number: int, chunk: Chunk) -> JSON:
        """A chunk of an answer to prompt `number`; None if it tells nothing yet."""
        asked, index = self.asked, number * self.asked.answers + chunk.index
        first = index not in self._told
        told = self._told.setdefault(index, _Told(tools.Said(asked.tools)))
        told.tokens += len(chunk.token_ids)
        choice: dict[str, JSON] = {"index": index, "finish_reason": chunk.finish_reason or None,
                                   "logprobs": self._logprobs(number, chunk, chunk.text, told), **self._ids(chunk)}
        about = self._prompt_ids(number, chunk) if first else {}
        if asked.chat:
            part = told.said.part(chunk.text, chunk.tool_call_parser, last=bool(chunk.finish_reason))
            choice["finish_reason"] = told.said.finish_reason(chunk.finish_reason) or None
            choice["delta"] = {"role": "assistant", **part} if first else part
            if not any((choice["delta"], choice["finish_reason"], choice["logprobs"], choice.get("token_ids"))):
                return None
        else:
            choice |= {"text": chunk.text, **about}
            about = {}
        return self._envelope("chat.completion.chunk" if asked.chat else "text_completion", [choice]) | about | (
            {"usage": _counts(chunk.prompt_tokens, told.tokens)} if asked.each_usage else {})

    def total(self, usages: Iterable[Sequence[pb.Usage]]) -> JSON:
        """The last piece, for a client that asked for it. `usages`: of the answers to each prompt."""
        name = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return self._envelope(name, []) | {"usage": _usage(usages)}

    def _envelope(self, kind: str, choices: list[JSON]) -> dict[str, JSON]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _ids(self, part: Chunk | Result) -> dict[str, JSON]:
        return {"token_ids": list(part.token_ids)} if self.asked.token_ids else {}

    def _prompt_ids(self, number: int, part: Chunk | Result) -> dict[str, JSON]:
        """Of the prompt that `part` has, or which came as ids. vLLM tells them beside a chat's choices, else in each."""
        prompt = self.asked.prompts[number]
        ids = prompt if isinstance(prompt, tuple) else part.prompt_token_ids
        return {"prompt_token_ids": list(ids)} if self.asked.token_ids else {}

    def _choice(self, number: int, result: Result) -> JSON:
        told = _Told(tools.Said(self.asked.tools))
        choice: dict[str, JSON] = {
            "index": number * self.asked.answers + result.index, "finish_reason": result.finish_reason,
            "logprobs": self._logprobs(number, result, result.echo, told), **self._ids(result)}
        if not self.asked.chat:
            return {**choice, "text": result.text, **self._prompt_ids(number, result)}
        message: JSON = {"role": "assistant", **told.said.whole(result.text, result.tool_call_parser)}
        return {**choice, "message": message, "finish_reason": told.said.finish_reason(result.finish_reason)}

    def _logprobs(self, number: int, part: Chunk | Result, echo: str, told: _Told) -> JSON:
        """`echo`: text of the prompt's tokens, if `part` has them."""
        if self.asked.logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [_scored(t) | {"top_logprobs": [_scored(other) for other in t.top]}
                                for t in part.logprobs]}
        as_sent = len(part.prompt_token_ids) if self.asked.echo and isinstance(self.asked.prompts[number], str) else 0
        tokens = list(part.logprobs)
        if part.prompt_token_ids and self.asked.echo:
            tokens = [*_echoed(echo, bool(as_sent), part.prompt_logprobs), *tokens]
        known = [token.rank > 0 for token in tokens]
        return {"tokens": [_name(t) for t in tokens],
                "text_offset": [told.place(t, k < as_sent) for k, t in enumerate(tokens)],
                "token_logprobs": [t.logprob if yes else None for t, yes in zip(tokens, known, strict=True)],
                "top_logprobs": [{_name(other): other.logprob for other in (t, *reversed(t.top))} if yes else None
                                 for t, yes in zip(tokens, known, strict=True)]}


def asked_for(chunk: Chunk, asked: Asked) -> Chunk:
    """Without the text of an echo, or of an answer, that nobody asked for."""
    if asked.prompt_alone:
        return _of_prompt(chunk)
    return chunk if asked.echo or not chunk.prompt_token_ids else replace(chunk, text="")


def _of_prompt(chunk: Chunk) -> Chunk:
    """What it says but for the answer."""
    usage = chunk.usage and pb.Usage(prompt_tokens=chunk.usage.prompt_tokens, cached_tokens=chunk.usage.cached_tokens)
    return replace(chunk, text=chunk.text if chunk.prompt_token_ids else "", token_ids=(), logprobs=(), usage=usage,
                   finish_reason="length" if chunk.finish_reason == "stop" else chunk.finish_reason)


def _echoed(text: str, as_sent: bool, scored: Sequence[pb.ScoredToken]) -> list[pb.ScoredToken]:
    """With the prompt's first token, of which the model says nothing: rank 0. Its text is what the others leave of the
    prompt's; `as_sent`: in that are its special tokens.
    """
    said = text.encode()
    others = b"".join(_bytes(token) for token in scored if as_sent or not token.special)
    if not as_sent:
        said += _half(others)  # is said with the answer that completes it
    if len(others) > len(said):  # the space before a first word, which SentencePiece adds behind BOS
        scored[0].text = scored[0].text.removeprefix(" ")
    unclear = not as_sent and "\ufffd" in text  # nobody knows for how many bytes that is
    raw = b"" if unclear else said[: max(0, len(said) - len(others))]
    return [pb.ScoredToken(text=raw.decode(errors="replace"), raw=raw), *scored]


def _half(text: bytes) -> bytes:
    """The beginning of a character that ends it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    return decoder.getstate()[0]


@dataclass(slots=True)
class _Told:
    """What was told of one choice so far."""

    said: tools.Said
    tokens: int = 0
    _chars: int = 0  # that are whole
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def place(self, token: pb.ScoredToken, as_sent: bool) -> int:
        """Of the next token in the text: of the character that it begins or goes on with. `as_sent`: of a text whose special
        tokens are in its echo.
        """
        at = self._chars
        if as_sent or not token.special:
            self._chars += len(self._utf8.decode(_bytes(token)))
        return at


def _scored(token: pb.ScoredToken) -> dict[str, JSON]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(_bytes(token))}


def _name(token: pb.ScoredToken) -> str:
    """Its text, or as OpenAI has them the bytes of one that is no whole characters: others have the same U+FFFD."""
    try:
        return token.raw.decode() or token.text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def _bytes(token: pb.ScoredToken) -> bytes:
    return token.raw or token.text.encode()


def _usage(usages: Iterable[Sequence[pb.Usage]]) -> JSON:
    """Prompts count once, whatever n is."""
    usages = [of_prompt for of_prompt in usages if of_prompt]
    prompt = sum(of_prompt[0].prompt_tokens for of_prompt in usages)
    answered = sum(u.completion_tokens for of_prompt in usages for u in of_prompt)
    return _counts(prompt, answered) | {
        "prompt_tokens_details": {"cached_tokens": sum(of_prompt[0].cached_tokens for of_prompt in usages)}}


def _counts(prompt: int, answered: int) -> dict[str, JSON]:
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


def models(status: pb.ClusterStatus, created: int) -> JSON:
    """GET /v1/models; `max_model_len` is vLLM's extension, which bench tools read."""
    return {"object": "list", "data": [model(known, created) for known in status.models]}


def model(known: pb.ModelStatus, created: int) -> JSON:
    return {"id": known.name, "object": "model", "created": created, "owned_by": "blitzjax",
            "max_model_len": known.max_model_len}


def failure(error: BlitzError) -> tuple[int, JSON]:
    """→ HTTP status and body."""
    status, kind = _STATUS.get(error.code, (500, "internal_error"))
    return status, {"error": {"message": brief(str(error)), "type": kind, "param": None, "code": status}}

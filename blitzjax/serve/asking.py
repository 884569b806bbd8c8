"""What a client asks for and what it gets: keyword options as a request, messages as chunks, chunks as results."""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, TypedDict

from blitzjax.errors import InvalidRequest
from blitzjax.v1 import inference_pb2 as pb

CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, JSON]]  # text, token ids (an array, too), or a chat
Tools: TypeAlias = Sequence[Mapping[str, JSON]]  # as OpenAI has them
_KINDS = {"Tools": "functions, as OpenAI has them"}  # of Options, for people


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; what is absent is the server's default. See inference.proto."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    echo: bool
    fill_context: bool
    json_schema: str | Mapping[str, object]  # at most one of these five: what the answer must be
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]
    tools: Tools  # functions, as OpenAI has them; with a chat
    must_call: Sequence[str]
    one_call: bool
    model: str
    request_id: str
    priority: int  # lower goes first
    progress: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of an answer. The last one has `finish_reason` and `usage`, the first one what is of the prompt."""

    request_id: str
    index: int  # which of n answers
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.ScoredToken, ...]  # of token_ids, if asked for
    finish_reason: str
    usage: pb.Usage | None
    prompt_token_ids: tuple[int, ...]  # with echo: of this chunk, whose text is the prompt's
    prompt_logprobs: tuple[pb.ScoredToken, ...]  # of the prompt but its first token, if asked for
    progress: pb.Progress | None  # what the request waits for, if asked for; such a chunk has nothing else
    tool_call_parser: str  # with tools: how its text says calls, see calls.py
    prompt_tokens: int
    at_s: float  # since the call began, on this side


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. `ttft_s` and `token_times_s` count from the call, on this side."""

    request_id: str
    index: int
    text: str
    echo: str  # the part of `text` that is the prompt's
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.ScoredToken, ...]
    finish_reason: str
    usage: pb.Usage
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[pb.ScoredToken, ...]
    tool_call_parser: str
    ttft_s: float
    token_times_s: tuple[float, ...]
    total_s: float


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises TypeError for an option that does not exist, or what is of another type than it should be; InvalidRequest
    for a number or a text that no request can hold.
    """
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}; there are {', '.join(Options.__annotations__)}")
    if isinstance(stop := options.get("stop"), str):  # its characters would pass for strings
        options = options | {"stop": (stop,)}
    try:
        return _request(prompt, options)
    except (ValueError, OverflowError) as e:  # a number out of range, or half a character
        raise InvalidRequest(f"{_misfit(options) or 'prompt'}: {e}") from e
    except (TypeError, LookupError) as e:
        if name := _misfit(options):
            kind, value = Options.__annotations__[name].__forward_arg__, options[name]  # type: ignore[literal-required]
            raise TypeError(f"{name} must be {_KINDS.get(kind, kind)}, got {reprlib.repr(value)}") from e
        raise TypeError(f"a prompt is text, token ids, or a chat of messages, got {reprlib.repr(prompt)}: {e}") from e


def _misfit(options: Options) -> str:
    """The name of what no request can hold; empty if that is the prompt."""
    for name, value in options.items():
        try:
            _request(({"role": "user", "content": ""},), Options({name: value}))  # type: ignore[misc]  # one of them
        except (ValueError, OverflowError, TypeError, LookupError):
            return name
    return ""


def _request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    outside = ("model", "request_id", "priority", "progress", "timeout_s", "tools", "must_call", "one_call")
    given: dict[str, Any] = {k: v for k, v in options.items() if k not in CONSTRAINTS and k not in outside}
    sampling = pb.SamplingParams(**given, **_constraint(options))
    out = pb.GenerateRequest(model=options.get("model", ""), request_id=options.get("request_id", ""),
                             priority=options.get("priority", 0), progress=options.get("progress", False),
                             sampling=sampling)
    if not isinstance(options.get("timeout_s"), Real | None):
        raise TypeError("no number of seconds")
    if isinstance(prompt, str):
        out.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        out.chat.MergeFrom(pb.Chat(
            messages=map(_message, prompt), tools=map(_function, options.get("tools", ())),
            must_call=options.get("must_call", ()), one_call=options.get("one_call", False)))
    else:
        out.tokens.SetInParent()
        out.tokens.ids.extend(prompt)  # type: ignore[arg-type]  # no chat; protobuf refuses what is no token id
    if options.get("tools") and not out.HasField("chat"):
        raise TypeError("tools need a chat")
    return out


def _constraint(options: Mapping[str, Any]) -> dict[str, Any]:
    """As its message has it. Raises InvalidRequest for two of them."""
    given = {name: options[name] for name in CONSTRAINTS if options.get(name, False) is not False}
    if len(given) > 1:
        raise InvalidRequest(f"an answer follows one of {', '.join(CONSTRAINTS)}; got {' and '.join(given)}")
    if isinstance(schema := given.get("json_schema"), Mapping):
        given["json_schema"] = json.dumps(schema)
    if (choice := given.get("choice")) is not None:
        given["choice"] = pb.Choices(choices=(choice,) if isinstance(choice, str) else choice)
    return given


def _message(said: Any) -> pb.ChatMessage:
    match said:
        case {"role": str(role), "content": str(content)}:
            calls = [pb.ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
                     for call in said.get("tool_calls", ())]
            return pb.ChatMessage(role=role, content=content, tool_calls=calls,
                                  tool_call_id=said.get("tool_call_id", ""))
    raise TypeError(f"a message has a role and a content, both of them text; got {said}")


def _function(tool: Mapping[str, Any]) -> pb.Function:
    of = tool["function"]
    parameters = of.get("parameters")
    return pb.Function(name=of["name"], description=of.get("description") or "",
                       parameters="" if parameters is None else json.dumps(parameters))


def collect(chunks: Sequence[Chunk]) -> Result:
    """Joins the chunks of one complete answer. Raises ValueError when they are of several, or the last is not here."""
    chunks = [chunk for chunk in chunks if chunk.progress is None]
    first, last = chunks[0], chunks[-1]
    if any(chunk.index != last.index for chunk in chunks):
        raise ValueError("these are several answers (n > 1); use generate_all")
    if last.usage is None:
        raise ValueError("the answer is not complete")
    times = tuple(chunk.at_s for chunk in chunks for _ in chunk.token_ids)
    return Result(
        request_id=last.request_id, index=last.index, text="".join(c.text for c in chunks),
        echo=first.text if first.prompt_token_ids else "",
        token_ids=tuple(t for c in chunks for t in c.token_ids), logprobs=tuple(t for c in chunks for t in c.logprobs),
        finish_reason=last.finish_reason, usage=last.usage, prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs, tool_call_parser=last.tool_call_parser,
        ttft_s=times[0] if times else last.at_s, token_times_s=times, total_s=last.at_s)


def collect_all(chunks: Sequence[Chunk]) -> list[Result]:
    """Joins the chunks of all answers to one request, by index."""
    chunks = [chunk for chunk in chunks if chunk.progress is None]
    return [collect([c for c in chunks if c.index == index]) for index in sorted({c.index for c in chunks})]


def chunk_of(message: pb.GenerateResponse, started: float) -> Chunk:
    return Chunk(
        request_id=message.request_id, index=message.index, text=message.text, token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs), finish_reason=message.finish_reason,
        usage=message.usage if message.HasField("usage") else None, prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=tuple(message.prompt_logprobs),
        progress=message.progress if message.HasField("progress") else None,
        tool_call_parser=message.tool_call_parser, prompt_tokens=message.prompt_tokens, at_s=time.monotonic() - started)

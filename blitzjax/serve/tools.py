"""OpenAI's tools: what a body asks of functions, how messages tell of calls, and how an answer shows its own.

Invariant: a streamed answer adds up to the whole one; calls have their ids from here, and keep them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blitzjax.errors import InvalidRequest
from blitzjax.serve import calls, calls_xml
from blitzjax.serve.asking import JSON, Options
from blitzjax.serve.calls import Call

_ID_CHARS = 9  # as many letters and digits as templates of Mistral insist on
_CHOICES = 'none, auto, required, or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, slots=True)
class Tools:
    """What one body asks for. Without `functions` answers are text and nothing else."""

    functions: tuple[Mapping[str, Any], ...] = ()
    must_call: tuple[str, ...] = ()
    named: bool = False  # the caller chose the function
    parallel: bool = True

    @property
    def options(self) -> Options:
        if not self.functions:
            return {}
        return {"tools": self.functions, "must_call": self.must_call, "one_call": self.named or not self.parallel}


def asked(given: Sequence[JSON] | None, choice: str | Mapping[str, JSON] | None, parallel: bool | None) -> Tools:
    """`tools`, `tool_choice` and `parallel_tool_calls` of a body. Raises InvalidRequest."""
    functions = tuple(_function(f"tools[{k}]", tool) for k, tool in enumerate(given or ()))
    names = [function["function"]["name"] for function in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"tools must have different names, got {', '.join(names)}")
    parallel = parallel is not False
    match choice:
        case "none":
            return Tools()
        case None | "auto":
            return Tools(functions, parallel=parallel)
        case "required" if functions:
            return Tools(functions, tuple(names), parallel=parallel)
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return Tools(functions, (name,), named=True)
        case "required" | {"type": "function", "function": {"name": str()}}:
            raise InvalidRequest(f"tool_choice is {choice}, but tools are {', '.join(names) or 'none'}")
    raise InvalidRequest(f"tool_choice must be {_CHOICES}, got {choice}")


def _function(where: str, tool: Any) -> Mapping[str, Any]:
    match tool:
        case {"type": "function", "function": {"name": str()} as function}:
            pass
        case _:
            raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{"name": ..., '
                                 '"parameters": ...}}')
    for name, kind in (("description", str), ("parameters", dict)):
        if not isinstance(function.get(name), kind | None):
            raise InvalidRequest(f"{where}.function.{name} must be {kind.__name__}, got {function[name]!r}")
    return tool


def calls_of(where: str, role: str, message: Mapping[str, JSON]) -> dict[str, JSON]:
    """What a message of a chat tells of calls, checked. Raises InvalidRequest."""
    made, answered = message.get("tool_calls"), message.get("tool_call_id")
    if role == "function" or message.get("function_call") is not None:
        raise InvalidRequest(f"{where}: role function and function_call are not supported; use role tool and "
                             "tool_calls")
    if role == "tool":
        if not isinstance(answered, str) or not answered:
            raise InvalidRequest(f"{where} must say which call it answers, with tool_call_id")
        return {"tool_call_id": answered}
    if role != "assistant" or not made:
        return {}
    for k, call in enumerate(made if isinstance(made, list) else [None]):
        match call:
            case {"id": str(), "type": "function", "function": {"name": str(), "arguments": str()}}:
                pass
            case _:
                raise InvalidRequest(f'{where}.tool_calls[{k}] must be {{"id": ..., "type": "function", "function": '
                                     '{"name": ..., "arguments": JSON as a text}}')
    return {"tool_calls": made}


@dataclass(slots=True)
class Said:
    """One answer on its way out."""

    tools: Tools
    _reader: calls.Reader | calls_xml.Reader | None = None
    _ids: list[str] = field(default_factory=list)

    def part(self, text: str, parser: str, last: bool) -> dict[str, Any]:
        """What is new of its message: content and calls, each with its `index`. `parser`: empty without functions."""
        if not parser:
            return {"content": text}
        self._reader = self._reader or self._new_reader(parser)
        said = self._reader.push(text, last)
        content = "".join(part for part in said if isinstance(part, str))
        parts: dict[int, dict[str, Any]] = {}
        for call in said:
            if isinstance(call, Call) and (self.tools.parallel or not call.index):
                self._add(parts, call)
        return ({"content": content} if content else {}) | ({"tool_calls": list(parts.values())} if parts else {})

    def _new_reader(self, parser: str) -> calls.Reader | calls_xml.Reader:
        if parser != calls.XML:
            return calls.Reader(calls.FORMATS[parser])
        functions = (tool["function"] for tool in self.tools.functions)
        return calls_xml.Reader({function["name"]: function.get("parameters") or {} for function in functions})

    def _add(self, parts: dict[int, dict[str, Any]], call: Call) -> None:
        if call.name:
            self._ids.append(uuid.uuid4().hex[:_ID_CHARS])
            parts[call.index] = {"index": call.index, "id": self._ids[-1], "type": "function",
                                 "function": {"name": call.name, "arguments": call.arguments}}
        elif call.index in parts:
            parts[call.index]["function"]["arguments"] += call.arguments
        else:
            parts[call.index] = {"index": call.index, "function": {"arguments": call.arguments}}

    def whole(self, text: str, parser: str) -> dict[str, Any]:
        """All of its message."""
        part = self.part(text, parser, last=True)
        for call in part.get("tool_calls", ()):
            del call["index"]
        return {"content": part.get("content", None if "tool_calls" in part else "")} | part

    def finish_reason(self, reason: str) -> str:
        """OpenAI's: of a call that the caller chose the end is an ordinary one, and so is that within a call."""
        whole = self._reader is not None and not any(k < len(self._ids) for k in self._reader.broken)
        return "tool_calls" if reason == "stop" and self._ids and whole and not self.tools.named else reason

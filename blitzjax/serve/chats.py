"""What does a model read of a chat, with calls and functions as its template has them, and what calls may it answer?

Invariant: a chat with functions is refused unless its model's template shows them and its way to write calls is known.
"""

from __future__ import annotations

import json
import re

from blitzjax.errors import InvalidRequest
from blitzjax.serve.calls import FORMATS, PARSERS, XML, format_of, grammar
from blitzjax.serve.tokenizer import Tokenizer
from blitzjax.types import ToolCallParser
from blitzjax.v1 import inference_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # OpenAI's rule


def render(chat: pb.Chat, tokenizer: Tokenizer) -> str:
    """Raises InvalidRequest."""
    if not chat.messages:
        raise InvalidRequest("the chat is empty; it needs at least 1 message")
    called: dict[str, str] = {}
    return tokenizer.chat([_message(m, called) for m in chat.messages], [_described(f) for f in chat.tools])


def parser_of(chat: pb.Chat, tokenizer: Tokenizer, configured: ToolCallParser) -> str:
    """How calls are to be read out of the answer; empty for a chat without functions. Raises InvalidRequest."""
    if not chat.tools and not chat.must_call:
        return ""
    if "tools" not in tokenizer.tool_template:
        raise InvalidRequest("this model's chat template does not mention tools, so it cannot be told of any; leave them out")
    name = format_of(tokenizer.tool_template) if configured == "auto" else configured
    if not name:
        raise InvalidRequest("the chat template does not say how this model writes calls; the server needs "
                             f"--tool-call-parser, one of {', '.join(PARSERS)}")
    return name


def grammars_of(chat: pb.Chat, parser: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Of the calls that may be, or must be, in an answer: as workers follow it, and the same in bytes alone. Raises
    InvalidRequest.
    """
    schemas = {f.name: _parameters(f) for f in chat.tools}
    if unknown := [name for name in chat.must_call if name not in schemas]:
        raise InvalidRequest(f"the answer must call {unknown[0]!r}, but tools are {', '.join(schemas) or 'none'}")
    if parser == XML:
        raise InvalidRequest(f"calls as {parser} has them follow no grammar: tool_choice must be auto or none, and an "
                             "answer that follows a schema, a grammar or choices may have no tools")
    known, several = FORMATS[parser], not chat.one_call
    if not chat.must_call and not known.written[0]:
        raise InvalidRequest(f"an answer that may be calls as {parser} has them cannot follow a schema, a grammar or "
                             "choices instead; leave those out, or tools")
    functions = {name: _closed(schemas[name]) for name in chat.must_call or schemas}
    return grammar(known, functions, several, tokenizer.ids(known.tags)), grammar(known, functions, several, {})


def _message(said: pb.ChatMessage, called: dict[str, str]) -> dict[str, object]:
    """`called`: names by the ids of calls so far; some templates want to have the name with the call's result."""
    if said.role not in ROLES:
        raise InvalidRequest(f"unknown chat role {said.role!r}; roles are {', '.join(ROLES)}")
    out: dict[str, object] = {"role": said.role, "content": said.content}
    if said.tool_calls:
        called |= {call.id: call.name for call in said.tool_calls}
        out["tool_calls"] = [{"id": call.id, "type": "function", "function": {
            "name": call.name, "arguments": _object(f"the arguments of call {call.id!r}", call.arguments or "{}")}}
            for call in said.tool_calls]
    if said.tool_call_id:
        out["tool_call_id"] = said.tool_call_id
        if said.tool_call_id in called:
            out["name"] = called[said.tool_call_id]
    return out


def _described(function: pb.Function) -> dict[str, object]:
    if not _NAME.fullmatch(function.name):
        raise InvalidRequest(f"a function's name has 1 to 64 of a-z, A-Z, 0-9, _ and -, got {function.name!r}")
    described = {"description": function.description} if function.description else {}
    return {"type": "function", "function": {"name": function.name, **described, "parameters": _parameters(function)}}


def _parameters(function: pb.Function) -> dict[str, object]:
    if not function.parameters:
        return {"type": "object", "properties": {}}
    schema = _object(f"the parameters of function {function.name!r}", function.parameters)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"the parameters of function {function.name!r} must be the schema of an object")
    return schema


def _closed(schema: dict[str, object]) -> dict[str, object]:
    """Allows no arguments that it does not name, unless it says otherwise."""
    composed = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"} & schema.keys()
    return {"type": "object", **({} if composed else {"additionalProperties": False}), **schema}


def _object(what: str, text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # with an escape JSON may say half a character, which no token can
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"{what} are not JSON: {e}") from e
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} must be a JSON object")
    return value

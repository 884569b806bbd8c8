"""What form may an answer be asked to have? Turns a request's constraint into a grammar that workers follow.

Invariant: a grammar that leaves here is one that llguidance takes, whatever the tokens of the model.
"""

from __future__ import annotations

import asyncio
import functools
import json
import typing

from blitzjax.errors import InvalidRequest
from blitzjax.v1 import inference_pb2 as pb

if typing.TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CONSTRAINT_BYTES = 128 << 10
_CALLS = "parameters of tools"
_KEPT = 64  # constraints that were found good
_BLANKS = r"[ \t\r\n]{0,32}"  # between the words of JSON: small models would go on with blanks for ever


async def grammar_of(s: pb.SamplingParams) -> str:
    """llguidance's grammar; empty for a request without a constraint. Raises InvalidRequest."""
    kind = s.WhichOneof("constraint")
    if kind is None or kind == "json_object" and not s.json_object:
        return ""
    text = {"json_object": lambda: '{"type":"object"}', "choice": lambda: _alternatives(s.choice.choices)}.get(
        kind, lambda: getattr(s, kind))()
    return await _limited(kind, text)


async def grammar_of_calls(calls: str, in_bytes: str, answer: str) -> str:
    """llguidance's grammar of `calls`, see calls.py, or of an `answer` instead, whose grammar it has made. `in_bytes`: the
    calls for any tokens. Raises InvalidRequest.
    """
    made = json.loads(answer)["grammars"] if answer.startswith("{") else [{"lark_grammar": answer}] if answer else []
    other = [only | {"name": "answer"} for only in made]
    start = f"start: calls{' | @answer' if answer else ''}\n"
    await _limited(_CALLS, json.dumps({"grammars": [{"lark_grammar": start + in_bytes}, *other]}))
    return json.dumps({"grammars": [{"lark_grammar": start + calls}, *other]})


async def _limited(kind: str, text: str) -> str:
    size = len(text.encode())
    if size > MAX_CONSTRAINT_BYTES:
        raise InvalidRequest(f"{kind} may have {MAX_CONSTRAINT_BYTES} bytes, got {size}")
    return await asyncio.to_thread(_checked, kind, text)


def _alternatives(choices: typing.Sequence[str]) -> str:
    """In Lark."""
    if not choices or not all(choices):
        raise InvalidRequest("choice needs at least 1 text, and none may be empty")
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))  # of a terminal, there may be thousands


@functools.lru_cache(_KEPT)
def _checked(kind: str, text: str) -> str:
    """Compiles it once, for its mistakes."""
    from llguidance import LLMatcher

    try:
        grammar = _grammar(kind, text)
        said = LLMatcher(_bytes(), grammar, log_level=0).get_error()
    except ValueError as e:
        said = str(e)
    if said:
        raise InvalidRequest(f"llguidance refuses the {kind}: {said.strip()}")
    return grammar


def _grammar(kind: str, text: str) -> str:
    """Raises ValueError; what it lets through may have mistakes."""
    from llguidance import LLMatcher, grammar_from

    if kind in ("json_schema", "json_object"):
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _BLANKS})
    if kind == _CALLS:
        return text
    return grammar_from("lark" if kind == "choice" else kind, text)  # type: ignore[arg-type]  # "regex" or "grammar"


@functools.cache
def _bytes() -> LLTokenizer:
    """One token for each byte: where tokens end does not matter to whether a grammar is right."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """What TokenizerWrapper wants."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([b]) for b in range(256)), b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

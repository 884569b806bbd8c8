"""Which calls are in an answer of Qwen3-Coder, that writes names and values between tags instead of JSON?

Invariant: as in calls.py, the content and calls of an answer are the same whatever the pieces that it comes in. A call
is told when it is whole: what looks like its beginning may be content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from blitzjax.serve.calls import XML_TAGS, Call
from blitzjax.serve.tokenizer import overlap

_OPENING, _CLOSING = XML_TAGS
_FUNCTION = re.compile(  # never looked at twice: answers are long
    r"\s*<function=([^>\n]+)>((?>\s*<parameter=[^>\n]+>(?s:.*?)</parameter>)*+)\s*</function>\s*")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>((?s:.*?))</parameter>")


class Reader:
    """Owned by one answer. Keeps what may become a call, and the white space before it, until that is known."""

    def __init__(self, schemas: Mapping[str, Mapping[str, object]]):
        """`schemas`: of the functions' arguments, by name."""
        self._schemas, self._held = schemas, ""
        self.broken: list[int] = []  # none: they are told when they are whole
        self._behind = False  # a call, and nothing but white space since
        self.calls = 0

    def push(self, text: str, last: bool) -> list[str | Call]:
        """Content and calls, in their order. `last`: no more text will come."""
        self._held += text
        said: list[str | Call] = []
        while (at := self._held.find(_OPENING)) >= 0:
            self._show(said, self._held[:at].rstrip())
            begin = self._held.find(_OPENING) + len(_OPENING)
            end = self._held.find(_CLOSING, begin)
            if end < 0 and not last:
                return said
            stop = len(self._held) if end < 0 else end
            found = _FUNCTION.fullmatch(self._held, begin, stop)
            if found is None:
                self._show(said, self._held[:begin])
            else:
                said.append(Call(self.calls, found[1], self._arguments(found[1], found[2])))
                self.calls += 1
                self._held, self._behind = self._held[stop + (len(_CLOSING) if end >= 0 else 0):], True
        rest = len(self._held) - overlap(self._held, _OPENING)
        self._show(said, self._held if last else self._held[:rest].rstrip())
        return said

    def _show(self, said: list[str | Call], text: str) -> None:
        """`text` is the beginning of what is held."""
        self._held = self._held[len(text):]
        if text := text.lstrip() if self._behind else text:
            said.append(text)
            self._behind = False

    def _arguments(self, function: str, written: str) -> str:
        properties = self._schemas.get(function, {}).get("properties")
        types = properties if isinstance(properties, Mapping) else {}
        return json.dumps({name: _typed(value.removeprefix("\n").removesuffix("\n"), types.get(name))
                           for name, value in _PARAMETER.findall(written)}, ensure_ascii=False)


def _typed(text: str, schema: object) -> object:
    """As vLLM's parser has it: what is no value of its type stays a text."""
    kind = schema.get("type", "object" if "anyOf" in schema else "string") if isinstance(schema, Mapping) else "string"
    if text.lower() == "null":
        return None
    if kind == "boolean":
        return text.lower() == "true"
    if kind == "string" or isinstance(kind, list) and "string" in kind:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    whole = kind in ("integer", "number") and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")

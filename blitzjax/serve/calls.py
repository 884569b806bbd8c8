"""How do models write calls of functions? The formats: known by a chat template, put into a grammar, and read again.

A call is told as it comes, once its name is there and its arguments begin. Invariant: the content and calls of an
answer are the same whatever the pieces that it comes in. What only looks like a call is content; nothing is lost but what
stands between calls.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from blitzjax.serve.tokenizer import overlap

_LEAD, _BETWEEN = string.whitespace + "[", string.whitespace + "],;"
_OUTSIDE_STRINGS = frozenset(' \t\r\n{}[],:"0123456789+-.Etruefalsn')
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON


@dataclass(frozen=True, slots=True)
class Format:
    """`opening` announces calls, which are JSON objects with "name" and `arguments`; `closing`, if any, ends them."""

    template: re.Pattern[str]  # finds what only templates for this format say
    opening: str
    closing: str
    written: tuple[str, str, str]  # before calls, between two, behind them; all empty: a call is the whole answer. A
    # space behind a tag may be left out, as newer models of Mistral do
    arguments: str = "arguments"

    @property
    def tags(self) -> tuple[str, ...]:
        """What may be a token of its own."""
        return tuple(filter(None, (self.opening, self.closing)))


FORMATS: Mapping[str, Format] = {
    "hermes": Format(re.compile(r'<tool_call>(?s:.*)"arguments\\?"'), "<tool_call>", "</tool_call>",
                     ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")),
    "llama3_json": Format(re.compile(r'\{"name": function name, "parameters": '), "<|python_tag|>", "", ("", "", ""),
                          "parameters"),
    "mistral": Format(re.compile(r"\A(?s:(?!.*\[ARGS\]).*)\[TOOL_CALLS\]"), "[TOOL_CALLS]", "",
                      ("[TOOL_CALLS] [", ", ", "]"))}

XML = "qwen3_coder"  # no JSON, see calls_xml.py
XML_TAGS = ("<tool_call>", "</tool_call>")
PARSERS = (*FORMATS, XML)
_XML_TEMPLATE = re.compile(r"<function=(?s:.*)<parameter=")


def tags_of(parser: str) -> tuple[str, ...]:
    """What may be a token of its own, and tells where calls are."""
    return XML_TAGS if parser == XML else FORMATS[parser].tags


@functools.cache
def format_of(template: str) -> str:
    """The name of the format that a chat template teaches, or empty."""
    if _XML_TEMPLATE.search(template):
        return XML
    return next((name for name, known in FORMATS.items() if known.template.search(template)), "")


def grammar(known: Format, functions: Mapping[str, Mapping[str, object]], several: bool, ids: Mapping[str, int]) -> str:
    """In Lark: "calls" of these functions, each with the schema of its arguments. `ids`: tags that are tokens."""
    def text(said: str) -> str:
        parts = re.split(f"({'|'.join(map(re.escape, known.tags))})( ?)", said)
        return " ".join(f"<[{ids[part]}]>" if part in ids else '" "?' if part == " " else json.dumps(part)
                        for part in parts if part)

    begin, between, end = map(text, known.written)
    calls = " | ".join(json.dumps(f'{{"name": "{name}", "{known.arguments}": ') + f' a{k} "}}"'
                       for k, name in enumerate(functions))
    arguments = (f"a{k}: %json {json.dumps({**schema, 'x-guidance': _COMPACT})}"
                 for k, schema in enumerate(functions.values()))
    more = f"({between} call)*" if several and between else ""
    return "\n".join((f"calls: {begin} call {more} {end}", f"call: {calls}", *arguments))


@dataclass(frozen=True, slots=True)
class Call:
    """What is new of call `index` of an answer; `name` comes with its first part."""

    index: int
    name: str
    arguments: str  # JSON, as the model has written it


class Reader:
    """Owned by one answer. Keeps what may become a call, and the white space before it, until that is known."""

    def __init__(self, known: Format):
        self._format = known
        self._phase, self._held, self._at = self._content, "", 0  # [0, at) of what is held was looked at
        self._object, self._begin, self._told = _Object(), 0, 0  # that is being read, from where; up to where it is told
        self._bare = not known.written[0]  # an object at the very beginning is a call
        self._behind = False  # a call, and nothing but white space since
        self.calls = 0
        self.broken: list[int] = []  # calls that were told, and turned out to be none, or cut off

    def push(self, text: str, last: bool) -> list[str | Call]:
        """Content and calls, in their order. `last`: no more text will come."""
        self._held += text
        said: list[str | Call] = []
        while self._phase(said, last):
            pass
        return said

    def _content(self, said: list[str | Call], last: bool) -> bool:
        """Like the other phases: → whether to go on, with the next one."""
        held = self._held.lstrip() if self._behind else self._held
        blank = len(held) - len(held.lstrip())
        bare = self._bare and held[blank:].startswith("{")
        at = blank if bare else held.find(self._format.opening)
        if at >= 0:
            shown = held[:at].rstrip()
        else:
            shown = held if last else held[:len(held) - overlap(held, self._format.opening)].rstrip()
        self._show(said, held[:len(shown)])
        self._held = held[len(shown):]
        if at >= 0:
            self._at = at - len(shown) + (0 if bare else len(self._format.opening))
            self._phase = self._before
        return at >= 0

    def _show(self, said: list[str | Call], text: str) -> None:
        if text:
            said.append(text)
            self._bare = self._behind = False

    def _before(self, said: list[str | Call], last: bool) -> bool:
        self._at = len(self._held) - len(self._held[self._at:].lstrip(_LEAD))
        if self._held.startswith("{", self._at):
            self._begin, self._told, self._object, self._phase = self._at, 0, _Object(), self._inside
            return True
        return (last or self._at < len(self._held)) and self._no_call(said)

    def _no_call(self, said: list[str | Call]) -> bool:
        """What was looked at is content after all."""
        self._show(said, self._held[:self._at])
        self._held, self._phase = self._held[self._at:], self._content
        return True

    def _inside(self, said: list[str | Call], last: bool) -> bool:
        made, fits = self._object, True
        while fits and self._at < len(self._held) and (made.depth or not made.size):
            fits = made.take(self._held[self._at])
            self._at += fits
        whole = bool(made.size) and not made.depth
        over = whole or last or not fits
        told = self._tell(said, over)
        if over:
            call = _valid(self._held[self._begin:self._at]) if whole else None
            if call is None and not told:
                return self._no_call(said)
            if call is None:
                self.broken.append(self.calls)
            elif not told:
                said.append(Call(self.calls, *call))
            self.calls += 1
            self._held, self._at, self._bare, self._behind = self._held[self._at:], 0, False, whole
            self._phase = self._after if whole else self._content
        return over

    def _tell(self, said: list[str | Call], over: bool) -> bool:
        """As much as there is of the arguments, the first object in the object; the name first, and if there will be more
        alone. → whether it is a call that is told as it comes: what comes may yet be no JSON.
        """
        inner, end = (self._begin + at for at in (self._object.inner, self._object.inner_end or self._object.size))
        if not self._told and self._object.inner and (name := _name(self._held[self._begin:inner])):
            said.append(Call(self.calls, name, ""))
            self._told = inner
            if not over:
                return True
        if self._told and end > self._told:
            said.append(Call(self.calls, "", self._held[self._told:end]))
            self._told = end
        return bool(self._told)

    def _after(self, said: list[str | Call], last: bool) -> bool:
        rest, closing = self._held.lstrip(_BETWEEN), self._format.closing
        if not last and closing.startswith(rest):
            return False
        if rest.startswith("{"):
            self._at, self._phase = len(self._held) - len(rest), self._before
            return True
        if closing.startswith(rest) or closing and rest.startswith(closing):  # an answer may end within it
            self._held = rest[len(closing):]
        self._phase = self._content
        return True


class _Object:
    """A JSON object that comes in pieces. `inner`, `inner_end`: where the first one in it is, 0: there is none."""

    def __init__(self) -> None:
        self.size = self.depth = self.inner = self.inner_end = 0
        self._quoted = self._escaped = False

    def take(self, c: str) -> bool:
        """False: this can be no JSON."""
        if self._quoted:
            self._quoted, self._escaped = self._escaped or c != '"', c == "\\" and not self._escaped
        elif c not in _OUTSIDE_STRINGS:
            return False
        else:
            self._quoted = c == '"'
            self.depth += (c in "{[") - (c in "]}")
            if c == "{" and self.depth == 2:
                self.inner = self.inner or self.size
            if c == "}" and self.depth == 1:
                self.inner_end = self.inner_end or self.size + 1
        self.size += 1
        return True


def _name(text: str) -> str:
    """Of the call whose arguments begin behind this; empty: it does not say, or they are not what begins."""
    try:
        match json.loads(text + "0}"):
            case {"name": str(name), "arguments": 0} | {"name": str(name), "parameters": 0}:
                return name
    except (ValueError, RecursionError):
        pass
    return ""


def _valid(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole call."""
    try:
        match json.loads(text):
            case {"name": str(name), "arguments": dict(given)} | {"name": str(name), "parameters": dict(given)} if name:
                return name, json.dumps(given, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    return None

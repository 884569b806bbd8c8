"""Calls come out of an answer as they are in it, whatever its pieces; a grammar lets nothing else in."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from blitzjax.serve.calls import FORMATS, PARSERS, Call, Reader, format_of, grammar
from blitzjax.types import ToolCallParser

ANY = {"type": "object"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}

names = st.sampled_from(["f", "get_weather", "a-b"])
values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"{}\\<", max_size=3), inner, max_size=3),
                      max_leaves=6)
calls = st.lists(st.tuples(names, st.dictionaries(st.text("xyz\"[", max_size=3), values, max_size=3)), min_size=1, max_size=3)


def written(form: str, made: Sequence[tuple[str, dict]]) -> str:
    known = FORMATS[form]
    begin, between, end = known.written
    return begin + between.join(json.dumps({"name": name, known.arguments: given}, ensure_ascii=False)
                                for name, given in made) + end


def read(form: str, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """→ content, calls."""
    reader, content, found = Reader(FORMATS[form]), "", []
    for k, piece in enumerate(pieces):
        for part in reader.push(piece, k == len(pieces) - 1):
            if isinstance(part, str):
                content += part
                continue
            if part.name:
                found.append((part.name, ""))
            assert part.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + part.arguments)
    assert reader.calls == len(found)
    return content, found


def cut(text: str, data: st.DataObject) -> list[str]:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), calls, st.sampled_from(["", "Let me see: {it} <tool", "[1]\n\n"]), st.data())
def test_calls_come_out_as_they_went_in_whatever_the_pieces(form, made, before, data) -> None:
    bare = form == "llama3_json"
    made, before = (made[:1], "") if bare else (made, before)
    content, found = read(form, cut(before + written(form, made), data))
    assert content == before.rstrip()
    assert [(name, json.loads(text)) for name, text in found] == made


PIECES = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f", ', '"arguments": ', '"parameters": ',
          '{"a": 1}', "}", "{", "]", "[", ";", ",", " ", "\n", "text", '"', "\\", "<", "</tool", '{"name": "f", "arguments": {}}']


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES), max_size=12), st.data())
def test_any_text_gives_the_same_whatever_its_pieces_and_loses_nothing(form, parts, data) -> None:
    text = "".join(parts)
    content, found = whole = read(form, [text])
    assert read(form, cut(text, data)) == whole == read(form, [*text, ""])
    if not found:
        assert content == text
    assert all(arguments.startswith("{") and arguments in text for _, arguments in found)


@pytest.mark.parametrize(("form", "text", "content", "found"), [
    ("hermes", 'So:\n<tool_call>\n{"name": "f", "arguments": {"a": "é</tool_call>"}}\n</tool_call>', "So:",
     [("f", '{"a": "é</tool_call>"}')]),
    ("hermes", '<tool_call>{"arguments": {}, "name": "f"}</tool_call> \n<tool_call>{"name": "g", "arguments": {}} </tool_call>\n',
     "", [("f", "{}"), ("g", "{}")]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>', "",
     [("f", "{}"), ("g", "{}")]),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {}}', "", [("f", "{}")]),  # ended without its tag
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_', "", [("f", "{}")]),  # ... or in it
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1,}}\n</tool_call> or so',
     "or so", [("f", '{"a": 1,}')]),  # it was told before this was known
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": x}}\n</tool_call>', "x}}\n</tool_call>", [("f", '{"a": ')]),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),  # cut
    ("hermes", '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    ("hermes", '<tool_call>{"name": {"arguments": {}}, "arguments": {}}', '<tool_call>{"name": {"arguments": {}}, "arguments": {}}', []),
    ("hermes", "<tool_call>\nnone </tool_call>", "<tool_call>\nnone </tool_call>", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', []),
    ("hermes", '<tool_call>{oops<tool_call>{"name": "f", "arguments": {}}</tool_call>then', "<tool_call>{oopsthen", [("f", "{}")]),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("llama3_json", '\n{"name": "f", "parameters": {"a": null}}', "", [("f", '{"a": null}')]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}', "",
     [("f", "{}"), ("g", "{}")]),
    ("llama3_json", 'I am {"name": "f", "parameters": {}}', 'I am {"name": "f", "parameters": {}}', []),
    ("llama3_json", '{"name": "Ann", "age": 7} is', '{"name": "Ann", "age": 7} is', []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}, {"name": "g", "arguments": {}}]', "",
     [("f", "{}"), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"na', ', {"na', [("f", "{}")])])
def test_what_is_a_call_and_what_only_looks_like_one(form: str, text: str, content: str, found: list[tuple[str, str]]) -> None:
    for pieces in ([text], [*text, ""]):
        assert read(form, pieces) == (content, found)


def test_text_is_kept_no_longer_than_needed_and_calls_come_as_they_are_made() -> None:
    pieces = ("Let ", "me <", "b> ", '\n<tool_call>\n{"name": "f", "argu', 'ments": ', '{"a": "x', "y", '"}', "}", "\n</tool_call>")
    reader = Reader(FORMATS["hermes"])
    assert [reader.push(piece, False) for piece in pieces] == [
        ["Let"], [" me"], [" <b>"], [], [], [Call(0, "f", "")], [Call(0, "", '{"a": "xy')], [Call(0, "", '"}')], [], []]


@pytest.mark.parametrize(("template", "form"), [
    (r"""{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}""", "hermes"),
    ("""{{- "<tool_call>\n" }}{{- '{"name": <function-name>, "arguments": <args-dict>}\n' }}""", "hermes"),
    (r"""{{- "<tool_call>\n<function=" + tool_call.name }}{% for name, value in tool_call.arguments|items %}""", ""),
    ("""{{- "<tool_call>\n<function=example>\n<parameter=a>\n" }}{{- '{"name": <function-name>, "arguments": 1' }}""", "qwen3_coder"),
    ("""{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name' }}""", "llama3_json"),
    ('{{- "[TOOL_CALLS] [" }}', "mistral"), ('{{- "[TOOL_CALLS]" + name + "[ARGS]" }}', ""), ("{{ messages }}", "")])
def test_a_template_says_which_format_its_model_writes(template: str, form: str) -> None:
    assert format_of(template) == form and {"auto", *PARSERS} == set(typing.get_args(ToolCallParser))


@pytest.mark.parametrize("tokens", [{}, {"<tool_call>": 257, "</tool_call>": 258, "[TOOL_CALLS]": 259}])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_grammar_has_the_calls_of_its_functions_and_no_others(form: str, tokens: dict[str, int]) -> None:
    known, tokenizer = FORMATS[form], byte_tokenizer({"<|eos|>": 256, **tokens})
    ids = {tag: tokens[tag] for tag in known.tags if tag in tokens}
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=[256])

    def fits(made: Sequence[tuple[str, dict]], several: bool, newer: bool = False) -> bool:
        text = written(form, made).replace("] [", "][" if newer else "] [")
        matcher = LLMatcher(vocabulary, "start: calls\n" + grammar(known, {"f": CITY, "g": ANY}, several, ids), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return all(matcher.consume_token(t) for t in tokenizer.encode(text).ids) and matcher.is_accepting()

    assert fits([("f", {"city": "Ye\"re}van"})], False) and fits([("g", {"x": [1, {}]})], False)
    assert fits([("g", {})], False, newer=True)
    assert fits([("f", {"city": ""}), ("g", {})], True) == (form != "llama3_json")
    assert not fits([("f", {"city": ""}), ("g", {})], False)
    assert not fits([("h", {})], True) and not fits([("f", {})], True) and not fits([("f", {"city": 1})], True)

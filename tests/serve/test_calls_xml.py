"""Calls of Qwen3-Coder come out of an answer as they are in it, whatever its pieces, with values of their types."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calls import cut
from test_tools import TOOLS, answer, chat, order, request
from toy import write_model

from blitzjax.errors import InvalidRequest
from blitzjax.serve.calls import Call
from blitzjax.serve.calls_xml import Reader

SCHEMA = {"type": "object", "properties": {
    "s": {"type": "string"}, "i": {"type": "integer"}, "x": {"type": "number"}, "b": {"type": "boolean"}, "l": {"type": "array"},
    "o": {"type": "object"}, "any": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "maybe": {"type": ["string", "null"]}}}
CALL = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"


def read(pieces: Sequence[str]) -> tuple[str, list[tuple[str, dict]]]:
    reader = Reader({"f": SCHEMA})
    said = [part for k, piece in enumerate(pieces) for part in reader.push(piece, k == len(pieces) - 1)]
    calls = [part for part in said if isinstance(part, Call)]
    assert [call.index for call in calls] == list(range(reader.calls))
    return "".join(p for p in said if isinstance(p, str)), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("name", "text", "value"), [
    ("s", "12", "12"), ("s", "\n two\nlines ", "\n two\nlines "), ("s", "null", None), ("i", "12", 12), ("i", "twelve", "twelve"),
    ("x", "1.5", 1.5), ("x", "2.0", 2), ("x", "NaN", "NaN"), ("b", "True", True), ("b", "no", False), ("l", "[1, \"é\"]", [1, "é"]),
    ("o", '{"a": {}}', {"a": {}}), ("o", "{", "{"), ("any", "3", 3), ("maybe", "3", "3"), ("unknown", "3", "3"), ("s", "", "")])
def test_values_have_the_types_of_their_schemas(name: str, text: str, value: object) -> None:
    parameter = f"<parameter={name}>\n{text}\n</parameter>\n"
    assert read([CALL.format(parameter)]) == ("", [("f", {name: value})])


PIECES = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=i>", "</parameter>", "7", "\n", " ", "text", "<", "</tool"]


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, CALL.format(""), CALL.format("<parameter=i>\n7\n</parameter>\n")]), max_size=12), st.data())
def test_any_text_gives_the_same_whatever_its_pieces_and_loses_nothing(parts, data) -> None:
    text = "".join(parts)
    content, found = whole = read([text])
    assert read(cut(text, data)) == whole == read([*text, ""])
    assert found or content == text


@pytest.mark.parametrize(("text", "content", "found"), [
    ("So: " + CALL.format("") + "\n" + CALL.format("<parameter=i>1</parameter>") + " then", "So:then", [("f", {}), ("f", {"i": 1})]),
    (CALL.format("").removesuffix("</tool_call>"), "", [("f", {})]),  # ended without its tag
    (CALL.format("<parameter=i>1"), CALL.format("<parameter=i>1"), []), ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", [])])
def test_what_is_a_call_and_what_only_looks_like_one(text: str, content: str, found: list) -> None:
    assert read([text]) == read([*text, ""]) == (content, found)


def test_what_is_no_call_after_all_is_found_out_in_one_go() -> None:
    text = CALL.format("<parameter=i>1</parameter>" * 40 + "oops")  # there would be 2^40 ways to read it
    assert read([text]) == (text, [])


def test_an_answer_with_tools_has_such_calls_and_cannot_be_made_to(tmp_path) -> None:
    write_model(tmp_path, template="{{ tools }}<tool_call>\n<function=a>\n<parameter=b>\n{{ messages }}")
    assert order(tmp_path, request(tools=TOOLS)).tool_call_parser == "qwen3_coder"
    for body in ({"tool_choice": "required"}, {"structured_outputs": {"regex": "a"}}):
        with pytest.raises(InvalidRequest, match="qwen3_coder has them follow no grammar"):
            order(tmp_path, request(tools=TOOLS, **body))
    text = ["Let me see.\n", "<tool_call>\n<function=weather>\n<parameter=city>\nEly\n</par", "ameter>\n</function>\n</tool_call>"]
    whole, stream = answer(chat(tools=TOOLS), text, parser="qwen3_coder")
    [call] = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ely"}'} and whole["message"]["content"] == "Let me see."
    [told] = [call for choice in stream for call in choice["delta"].get("tool_calls", ())]
    assert told["function"] == call["function"] and stream[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"

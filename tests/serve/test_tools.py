"""What may be asked of tools, what the model is told of them, and how calls look when they come back."""

from __future__ import annotations

import asyncio
import json

import pytest
from byte_tokenizer import byte_tokenizer
from toy import EOS, SPEC, write_model

from blitzjax.engine.grammars import Grammars
from blitzjax.errors import InvalidRequest
from blitzjax.serve import openai, replies
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.asking import Chunk, collect, generate_request
from blitzjax.serve.model import load_model
from blitzjax.serve.orders import order_of, prompt_of
from blitzjax.types import Sampling
from blitzjax.v1 import inference_pb2 as pb

WEATHER = {"name": "weather", "description": "Of a city", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": f} for f in (WEATHER, NOW)]
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TEMPLATE = """{% for t in tools or [] %}{{ t | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}:{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments":
{{- " " }}{{ c.function.arguments | tojson }}}</tool_call>{% endfor %};
{% endfor %}"""


def chat(**body: object) -> openai.Asked:
    return openai.chat({"messages": [{"role": "user", "content": "x"}], **body})


def request(**body: object) -> pb.GenerateRequest:
    asked = chat(**body)
    return generate_request(asked.prompts[0], asked.options)


def order(directory, made: pb.GenerateRequest, parser: str = "auto") -> Order:
    return asyncio.run(order_of(made, load_model(directory), 2000, 0, parser))


def prompt(directory, **body: object) -> list[str]:
    return bytes(order(directory, request(**body)).prompt).decode().splitlines()


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hermes"), template=TEMPLATE)


def test_the_template_is_told_of_functions_calls_and_their_results(hermes) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "123456789", "content": [{"type": "text", "text": "sunny"}]}]
    weather = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "strict"}}
    now = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    said = ["user:a;", "assistant:<tool_call>" + '{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>;', "tool(weather):sunny;"]
    assert prompt(hermes, messages=messages, tools=TOOLS) == [json.dumps(weather), json.dumps(now), *said]
    assert prompt(hermes, messages=messages, tools=TOOLS, tool_choice="none") == said


def test_a_chat_is_tokenized_as_it_is_asked(hermes) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    said, options = openai.tokenize({"messages": messages, "tools": TOOLS, "add_generation_prompt": True,
                                     "add_special_tokens": False, "return_token_strs": False, "chat_template_kwargs": {}})
    ids, _ = asyncio.run(prompt_of(generate_request(said, options), load_model(hermes), 2000))
    assert ids == order(hermes, request(messages=messages, tools=TOOLS)).prompt and b'"name": "now"' in bytes(ids)


def test_a_template_of_its_own_is_used_for_tools(tmp_path) -> None:
    both = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": TEMPLATE}, {"name": "rag", "template": "{% if"}]
    write_model(tmp_path, template=both)
    assert prompt(tmp_path) == ["d"] and prompt(tmp_path, tools=TOOLS)[-1] == "user:x;"


@pytest.mark.parametrize(("choice", "must_call", "one_call"), [
    (None, [], False), ("auto", [], False), ("required", ["weather", "now"], False), (NAMED, ["now"], True)])
def test_a_choice_says_what_the_answer_must_be(hermes, choice, must_call, one_call) -> None:
    made = request(tools=TOOLS, tool_choice=choice)
    assert (made.chat.must_call, made.chat.one_call) == (must_call, one_call)
    assert bool(order(hermes, made).sampling.grammar) == bool(must_call)
    assert request(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).chat.one_call


def function(**fields: object) -> dict[str, object]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}], "tool_choice": "required"}


def told(**message: object) -> dict[str, object]:
    return {"messages": [{"role": "assistant", **message}]}


@pytest.mark.parametrize(("body", "says"), [
    ({"tools": [{}]}, r"tools\[0\] must be"), ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, r"tools\[0\] must be"),
    (function(parameters="{}"), "parameters must be dict"), (function(description=1), "description must be str"),
    (function(name="a b"), "name has 1 to 64 of"), (function(parameters={"type": "array"}), "must be the schema of an object"),
    (function(parameters={"properties": {"x": {"type": "foo"}}}), "llguidance refuses the parameters of tools: .*foo"),
    ({"tools": TOOLS + TOOLS[:1]}, "different names"),
    ({"tool_choice": "required"}, "tool_choice is required, but tools are none"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "but tools are weather, now"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice must be none, auto, required"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls must be bool"),
    ({"functions": [NOW]}, "functions is not supported; use tools"),
    ({"function_call": "auto"}, "function_call is not supported; use tool_choice"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "use role tool and tool_calls"),
    (told(content=None, function_call={"name": "f", "arguments": "{}"}), "use role tool and tool_calls"),
    (told(content=None, tool_calls=[{**CALL, "id": 1}]), r"messages\[0\].tool_calls\[0\] must be"),
    (told(content=None, tool_calls={}), "content must be a text"),
    (told(content=None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]), "call '123456789' are not JSON"),
    (told(content=None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": "1"}}]), "must be a JSON object"),
    (told(content=None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": r'{"a": "\ud800"}'}}]), "surrogates"),
    (function(parameters={"title": "\ud800"}), "surrogates"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "with tool_call_id")])
def test_mistakes_are_named(hermes, body, says) -> None:
    with pytest.raises(InvalidRequest, match=says):
        order(hermes, request(**body))


@pytest.mark.parametrize("other", [
    {"response_format": {"type": "json_schema", "json_schema": {"schema": NUMBER}}}, {"structured_outputs": {"regex": '[{]"n": 7[}]'}},
    {"structured_outputs": {"choice": ['{"n": 7}', "no"]}}, {"structured_outputs": {"grammar": 'start: /[{]"n": [0-9][}]/'}}])
def test_an_answer_that_follows_something_may_be_calls_instead(hermes, other) -> None:
    """In which the functions' schemas are followed, too."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
    free, sure = order(hermes, request(tools=TOOLS, **other)), order(hermes, request(tools=TOOLS, tool_choice="required", **other))
    assert follows(free, call % "x") and follows(sure, call % "x") and follows(free, '{"n": 7}')
    assert not follows(sure, '{"n": 7}') and not follows(free, '{"m": 7}') and not follows(free, call.replace("city", "town"))
    with pytest.raises(InvalidRequest, match="calls as llama3_json has them"):
        order(hermes, request(tools=TOOLS, **other), "llama3_json")


def follows(made: Order, text: str) -> bool:
    grammars = Grammars(SPEC, lambda: byte_tokenizer({"<|eos|>": EOS}).to_str())
    matcher = grammars.matcher(made.sampling, text.encode())
    return not matcher.error and bool(matcher.allowed(len(text))[EOS // 32] >> EOS % 32 & 1)


def test_a_model_that_cannot_be_told_of_tools_says_so(model_dir, tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="does not mention tools"):
        order(model_dir, request(tools=TOOLS))
    silent = write_model(tmp_path, template="{{ tools }}{{ messages }}")
    with pytest.raises(InvalidRequest, match="--tool-call-parser, one of hermes, llama3_json, mistral, qwen3_coder"):
        order(silent, request(tools=TOOLS))
    assert order(silent, request(tools=TOOLS), "mistral").tool_call_parser == "mistral"
    with pytest.raises(InvalidRequest, match="must call 'f', but tools are none"):
        order(silent, generate_request([{"role": "user", "content": "x"}], {"must_call": ["f"]}), "mistral")
    with pytest.raises(TypeError, match="tools need a chat"):
        generate_request("x", {"tools": TOOLS})


def test_tags_are_text_for_answers_with_tools_alone(model_dir) -> None:
    """A special token of the vocabulary, as Mistral's are."""
    for parser, shown in (("hermes", "<tool_call>"), ("", "")):
        model = load_model(model_dir)
        model.tokenizer._tokenizer.add_special_tokens(["<tool_call>"])
        model.tokenizer.special.add(258)
        answer = Answer("r#0", Order("r", "toy", (97,), Sampling(), (), 0, 1, None, tool_call_parser=parser), 0, model, 0.0,
                        asyncio.Event())
        answer.push(0, [257, 258, ord("x"), 256], "stop", 0.0)
        assert answer.take().text == shown + "x"


def answer(asked: openai.Asked, pieces: list[str], reason: str = "stop", parser: str = "hermes") -> tuple[dict, list[dict]]:
    """→ the choice of the whole answer, those of its stream."""
    chunks = [Chunk("r", 0, text, (1,), (), reason if k == len(pieces) - 1 else "", pb.Usage() if k == len(pieces) - 1 else None,
                    (), (), None, parser if asked.tools.functions else "", 1, 0.0) for k, text in enumerate(pieces)]
    [whole] = replies.Reply(asked, "m", "r").whole([[collect(chunks)]])["choices"]
    reply = replies.Reply(asked, "m", "r")
    return whole, [event["choices"][0] for chunk in chunks if (event := reply.piece(0, chunk)) is not None]


def test_calls_of_a_free_answer_are_told_as_they_are_made() -> None:
    text = ('Well. <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": {"city": "Ely"}}\n</tool_call>')
    whole, stream = answer(chat(tools=TOOLS), [*text, ""])
    calls = whole["message"]["tool_calls"]
    assert [(c["type"], c["function"]) for c in calls] == [
        ("function", {"name": "now", "arguments": "{}"}), ("function", {"name": "weather", "arguments": '{"city": "Ely"}'})]
    assert len({c["id"] for c in calls}) == 2 and all(c["id"].isalnum() and len(c["id"]) == 9 for c in calls)
    assert whole["message"]["content"] == "Well." and whole["finish_reason"] == "tool_calls"
    told = [choice["delta"] for choice in stream]
    assert "".join(delta.get("content", "") for delta in told) == "Well." and told[0] == {"role": "assistant", "content": "W"}
    made = [call for delta in told for call in delta.get("tool_calls", ())]
    assert [(c["index"], c["type"], c["function"]) for c in made if "id" in c] == [
        (k, "function", {"name": c["function"]["name"], "arguments": ""}) for k, c in enumerate(calls)]
    for k, call in enumerate(calls):
        assert "".join(c["function"]["arguments"] for c in made if c["index"] == k) == call["function"]["arguments"]
    assert stream[-1]["finish_reason"] == "tool_calls" and not stream[-1]["delta"]
    assert len(stream) == len("Well.") + 2 + len('}"city": "Ely"}') + 1, "nothing is sent while nothing is known"
    whole, _ = answer(chat(tools=TOOLS, parallel_tool_calls=False), [text])
    assert [c["function"]["name"] for c in whole["message"]["tool_calls"]] == ["now"]


@pytest.mark.parametrize(("body", "reason", "finish"), [
    ({"tool_choice": "required"}, "stop", "tool_calls"), ({"tool_choice": NAMED}, "stop", "stop"), ({}, "length", "length")])
def test_an_answer_ends_as_openais_do(body, reason, finish) -> None:
    whole, stream = answer(chat(tools=TOOLS, **body), list('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'), reason)
    assert whole["finish_reason"] == stream[-1]["finish_reason"] == finish
    assert whole["message"]["content"] is None and len(whole["message"]["tool_calls"]) == 1
    assert all("content" not in choice["delta"] for choice in stream) and stream[0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("body", [{}, {"tool_choice": "required"}])
@pytest.mark.parametrize(("behind", "finish"), [
    ('<tool_call>{"name": "now", "arguments": {"a": [1', "stop"), ('<tool_call>{"name": "now", "arguments": {}', "stop"),
    ('<tool_call>{"name": "now", "arguments": {"a": x', "stop"),
    ('<tool_call>{"name": "now", "arguments": {"a": 1,}}', "stop"),
    ('<tool_call>{"name": "now"', "tool_calls"), ("<tool_", "tool_calls")])
def test_an_answer_that_stops_within_a_call_is_not_said_to_end_with_calls(body, behind, finish) -> None:
    """As where a stop string ends it; a call that nobody was told of is content."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    for before, parallel, wanted in ((call, True, finish), ("", True, "stop"), (call, False, "tool_calls")):
        whole, stream = answer(chat(tools=TOOLS, parallel_tool_calls=parallel, **body), list(before + behind))
        assert whole["finish_reason"] == stream[-1]["finish_reason"] == wanted
        assert answer(chat(tools=TOOLS, **body), list(before + behind), "length")[0]["finish_reason"] == "length"


def test_text_is_text_with_tools_and_without() -> None:
    text = ["<tool_call>", "{}", "</tool_call> ", "is how"]
    whole, stream = answer(chat(tools=TOOLS), text)
    assert whole["message"] == {"role": "assistant", "content": "".join(text)} and whole["finish_reason"] == "stop"
    assert "".join(choice["delta"].get("content", "") for choice in stream) == "".join(text)
    whole, stream = answer(chat(tools=TOOLS, tool_choice="none"), ['<tool_call>{"name": "now", "arguments": {}}</tool_call>'])
    assert whole["message"]["content"] == stream[0]["delta"]["content"] and "tool_calls" not in whole["message"]
    assert answer(chat(tools=TOOLS), ["", ""])[0]["message"] == {"role": "assistant", "content": ""}

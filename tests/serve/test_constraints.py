"""What an answer must be, asked for in every way: the same grammar reaches the workers."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from toy import EOS, SPEC, write_model

from blitzjax.engine.grammars import Grammars, Matcher
from blitzjax.errors import InvalidRequest
from blitzjax.serve import openai
from blitzjax.serve.asking import generate_request
from blitzjax.serve.constraints import grammar_of
from blitzjax.serve.model import load_model
from blitzjax.serve.orders import order_of
from blitzjax.serve.vllm_engine import translated
from blitzjax.types import Sampling
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import vllm_engine_pb2 as vllm

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
LARK, GBNF = 'start: "a" /[0-9]+/', 'root ::= "a" [0-9]+'


def of_client(**options: object) -> pb.GenerateRequest:
    return generate_request("x", options)


def of_openai(**body: object) -> pb.GenerateRequest:
    return generate_request("x", openai.completion({"prompt": "x", **body}).options)


def of_outputs(**given: object) -> pb.GenerateRequest:
    return of_openai(structured_outputs=given)


def of_vllm(**sampling: object) -> pb.GenerateRequest:
    return translated(vllm.GenerateRequest(text="x", sampling_params=vllm.SamplingParams(**sampling)))


FORM = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}


def matcher(request: pb.GenerateRequest, text: str) -> Matcher:
    """Behind an answer that begins with `text`."""
    grammars = Grammars(SPEC, lambda: byte_tokenizer({"<|eos|>": EOS}).to_str())
    return grammars.matcher(Sampling(grammar=asyncio.run(grammar_of(request.sampling))), text.encode())


@pytest.mark.parametrize(("requests", "whole", "wrong"), [
    ((of_client(json_schema=SCHEMA), of_client(json_schema=json.dumps(SCHEMA)), of_vllm(json_schema=json.dumps(SCHEMA)),
      of_openai(response_format=FORM), of_outputs(json=SCHEMA), of_outputs(json=json.dumps(SCHEMA))),
     '{\n  "n": -12\n}', '{"m'),
    ((of_client(json_object=True), of_vllm(json_object=True), of_openai(response_format={"type": "json_object"}),
      of_outputs(json_object=True)), '{"a": [1, {"b": null}]}', "[1"),
    ((of_client(regex="[a-c]{3}"), of_vllm(regex="[a-c]{3}"), of_outputs(regex="[a-c]{3}")), "abc", "abd"),
    ((of_client(choice=["yes", 'a "no"']), of_vllm(choice={"choices": ["yes", 'a "no"']}),
      of_outputs(choice=["yes", 'a "no"'])), 'a "no"', "a no"),
    ((of_client(choice="yes", json_object=False),), "yes", "no")])
def test_every_way_to_ask_gives_a_grammar_that_has_the_answer_and_no_other(
        requests: tuple[pb.GenerateRequest, ...], whole: str, wrong: str) -> None:
    assert len({asyncio.run(grammar_of(request.sampling)) for request in requests}) == 1
    for request in requests:
        assert not (half := matcher(request, whole[:-1])).over and not half.error
        assert matcher(request, whole).over and "doesn't satisfy the grammar" in matcher(request, wrong).error


@pytest.mark.parametrize("made", [of_client(grammar=LARK), of_client(grammar=GBNF), of_vllm(grammar=GBNF), of_outputs(grammar=LARK)])
def test_a_grammar_is_lark_or_gbnf(made: pb.GenerateRequest) -> None:
    assert not matcher(made, "a17").error and matcher(made, "17").error


@pytest.mark.parametrize("made", [
    of_client(), of_client(json_object=False), of_vllm(), of_vllm(json_object=False), of_outputs(),
    of_openai(response_format={"type": "text"})])
def test_most_requests_ask_for_nothing(made: pb.GenerateRequest) -> None:
    assert asyncio.run(grammar_of(made.sampling)) == ""


def test_blanks_between_json_tokens_come_to_an_end() -> None:
    made = of_client(json_object=True)
    assert not matcher(made, "{" + " " * 32).error and matcher(made, "{" + " " * 33).error


def test_a_model_without_a_tokenizer_says_that_it_needs_one(tmp_path) -> None:
    model = load_model(write_model(tmp_path / "bare", tokenizer=False))
    request = generate_request([1, 2], {"choice": ["a"]})
    with pytest.raises(InvalidRequest, match="no tokenizer, so its answers cannot follow"):
        asyncio.run(order_of(request, model, 512, 0))


def test_there_may_be_thousands_of_choices() -> None:
    choices = [f'w{k} "\\n/|' for k in range(5000)]
    grammar = asyncio.run(grammar_of(of_outputs(choice=choices).sampling))
    matcher = Grammars(SPEC, lambda: byte_tokenizer({"<eos>": EOS}).to_str()).matcher(Sampling(grammar=grammar), ())
    assert matcher is not None and np.count_nonzero(matcher.allowed(0)) == 1 and not matcher.error
    for byte in choices[4711].encode():
        matcher.push(byte)
    assert not matcher.error and matcher.allowed(len(choices[4711]))[EOS // 32] >> EOS % 32 & 1

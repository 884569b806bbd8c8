"""Tokens to answers, without sockets: attempts, indices, stop strings, the last piece."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from toy import EOS, toy_config
from hypothesis import given
from hypothesis import strategies as st

from blitzjax.serve.answers import Answer, Order, Piece, seed_of
from blitzjax.serve.controller import Controller
from blitzjax.serve.model import load_model
from blitzjax.types import Sampling, TokenLogprob
from blitzjax.v1 import worker_pb2 as pb

_MODEL = []


@pytest.fixture(scope="module", autouse=True)
def model(model_dir):
    _MODEL[:] = [load_model(model_dir)]
    return _MODEL[0]


def order(*stop: str, **sampling) -> Order:
    return Order("mine", "toy", (ord("a"),), Sampling(**sampling), stop, 0, n=1, echo=None)


def answer(*stop: str, **sampling) -> Answer:
    return Answer("mine#0", order(*stop, **sampling), 0, _MODEL[0], 1.0, asyncio.Event())


@given(st.integers(0, 3), st.lists(st.integers(0, 6), max_size=6))
def test_repeated_tokens_are_ignored(length, starts):
    whole = list(b"bcdefg")
    a = answer()
    a.push(0, whole[:length], None, 2.0)
    for start in starts:
        if start <= len(a.generated):
            a.push(start, whole[start:start + 2], None, 3.0)
    assert a.generated == whole[:len(a.generated)]
    assert a.take().token_ids == a.generated and a.take().token_ids == []


def test_missing_tokens_are_an_error():
    a = answer()
    a.push(0, [98], None, 2.0)
    with pytest.raises(IndexError, match="tokens 1..2"):
        a.push(3, [101], None, 2.0)


def test_next_attempt_continues_after_what_was_emitted():
    a = answer(max_tokens=10)
    assert a.work(7, now=2.0).generated == ()
    a.push(0, [98, 99], None, 2.5)
    work = a.work(8, now=3.0)
    assert (work.attempt, work.generated, work.sampling.max_tokens) == (8, (98, 99), 10)
    assert (a.attempts, a.assigned_s, a.first_token_s) == (2, 2.0, 2.5)


def test_stop_string_inside_one_message_drops_the_tokens_behind_it():
    a = answer("cd")
    a.push(0, list(b"bcdef"), "length", 2.0)
    assert (a.take().text, a.generated, a.finish_reason) == ("b", list(b"bcd"), "stop")


def test_stop_string_that_only_the_last_flush_completes():
    a = answer("\ufffd")
    a.push(0, [98, 0xC3], "length", 2.0)
    assert (a.take().text, a.finish_reason) == ("b", "stop")


def test_stop_strings_count_only_after_the_least_number_of_tokens():
    a = answer("cd", "gh", min_tokens=4)
    a.push(0, list(b"bcdefghi"), "length", 2.0)
    assert (a.take().text, a.generated, a.finish_reason) == ("bcdef", list(b"bcdefgh"), "stop")
    a = answer("cd", min_tokens=3)
    a.push(0, list(b"bcd"), "length", 2.0)
    assert (a.take().text, a.finish_reason) == ("bcd", "length")


def test_what_is_said_of_the_prompt_goes_before_the_first_token_once():
    a = Answer("mine#0", replace(order(), echo="the prompt "), 0, _MODEL[0], 1.0, asyncio.Event())
    assert (a.take().text, a.take().echo) == ("", None)
    known = [TokenLogprob(-float(i), 1, (), ()) for i in range(3)]
    a.push(0, [98], None, 2.0, known[:1], known[2:])
    a.push(0, [98, 99], None, 2.0, known[:2], known[2:])  # a later attempt says it again
    piece = a.take()
    assert piece.echo == Piece("the prompt ", prompt_token_ids=(97,), prompt_logprobs=known[2:])
    assert (piece.text, piece.token_ids, piece.logprobs) == ("bc", [98, 99], known[:2])
    a.push(2, [100], "length", 2.0, known[:1])
    piece = a.take()
    assert (piece.text, piece.echo, a.generated) == ("d", None, [98, 99, 100])


def test_answers_of_one_order_have_seeds_of_their_own():
    seeds = [seed_of(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(64)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert [seed_of(s, 0) for s in (0, 1, 2**63 - 1)] == [0, 1, 2**63 - 1]


def test_stop_token_has_no_text_but_the_same_token_inside_has():
    a = answer(stop_token_ids=(99,))
    a.push(0, [98, 99], "stop", 2.0)
    assert (a.take().text, a.generated) == ("b", [98, 99])
    a = answer(stop_token_ids=(99,))
    a.push(0, [98, 99], "length", 2.0)
    assert a.take().text == "bc"


def test_nothing_is_added_after_the_end():
    a = answer()
    a.push(0, [98, EOS], "stop", 2.0)
    a.end("abort")
    a.fail("INTERNAL", "too late")
    assert (a.finish_reason, a.failure) == ("stop", None)


def test_tokens_of_a_stale_attempt_are_dropped(model):
    controller = Controller(toy_config(), [model], {"i0": "127.0.0.1:1", "i1": "127.0.0.1:2"})
    [a] = controller.submit(order())
    assert a.attempt == -1  # no instance yet
    a.work(3, 0.0)
    for attempt in (2, 3, 4):
        controller.on_tokens("i0", pb.Tokens(request_id=a.request.id, attempt=attempt, token_ids=[90 + attempt]))
    assert a.generated == [93]
    controller.on_tokens("i0", pb.Decoded(request_ids=[a.request.id, "nobody's", a.request.id], attempts=[2, 3, 3],
                                          starts=[1, 1, 1], token_ids=[80, 81, 82]))
    assert a.generated == [93, 82]
    controller.on_tokens("i0", pb.Tokens(request_id="nobody's", attempt=0, token_ids=[1]))
    controller.leave([a])
    assert not controller.busy


def test_a_hole_in_the_tokens_fails_the_request_instead_of_hiding_it(model):
    controller = Controller(toy_config(), [model], {"i0": "127.0.0.1:1"})
    [a] = controller.submit(order())
    a.work(1, 0.0)
    controller.on_tokens("i0", pb.Tokens(request_id=a.request.id, attempt=1, start=2, token_ids=[5]))
    assert a.failure.code == "INTERNAL" and "never came" in a.failure.message
    assert not controller.busy


def test_of_one_step_each_answer_has_its_own(model):
    controller = Controller(toy_config(), [model], {"i0": "127.0.0.1:1"})
    answers = [controller.submit(replace(order("b"), request_id=name))[0] for name in ("stops", "lacks", "goes on")]
    for a in answers:
        a.work(1, 0.0)
    controller.on_tokens("i0", pb.Decoded(request_ids=[a.request.id for a in answers], attempts=[1, 1, 1],
                                          starts=[0, 2, 0], token_ids=[ord("b"), ord("c"), ord("c")]))
    assert [a.generated for a in answers] == [[ord("b")], [], [ord("c")]]
    assert answers[0].finish_reason == "stop" and "never came" in answers[1].failure.message
    assert [a.request.id for a in controller.replica.orders] == [answers[2].request.id]

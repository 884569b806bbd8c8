"""Requests through the real controller over real sockets; toy_worker.py says what the right answers are."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from toy import AT_ONCE_S, EOS, RESUME_S, VOCAB, eventually, held
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blitzjax.errors import BlitzError, InvalidRequest, UnknownModel
from blitzjax.serve.answers import seed_of
from blitzjax.serve.asking import collect, collect_all
from blitzjax.serve.client import AsyncClient, Client
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

SLOW = 0.05  # seconds per token
LASTING = {"max_tokens": 500, "temperature": 0.5}  # 250 s: it does not end by itself while a test waits for AT_ONCE_S


def toy(last: int, n: int) -> tuple[int, ...]:
    return tuple((last + 1 + i) % VOCAB for i in range(n))


def quiet(client: Client) -> bool:
    """Nothing queued, nothing running, no page in use."""
    s = client.status()
    return not s.queued_requests and not s.running_requests and not any(i.pages_used for i in s.instances)


def test_text_answer(client):
    result = client.generate("a", max_tokens=5)
    assert (result.text, result.token_ids, result.finish_reason) == ("bcdef", toy(97, 5), "length")
    usage = result.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.attempts) == (1, 5, 1)
    assert 0 <= usage.queue_s <= usage.ttft_s <= result.ttft_s


def test_tokens_arrive_one_by_one(client):
    """A machine that stalls may join some of them, but not every time."""
    for _ in range(5):
        chunks = list(client.stream([10], max_tokens=30, temperature=SLOW))
        assert sum((c.token_ids for c in chunks), ()) == toy(10, 30)
        assert [c.finish_reason for c in chunks] == [*[""] * (len(chunks) - 1), "length"]
        if len(chunks) > 4 and chunks[-1].at_s - chunks[0].at_s > 5 * SLOW:
            return
    raise AssertionError("they arrived together")


def test_chat_is_rendered_with_the_template(client):
    result = client.generate([{"role": "user", "content": "x"}], max_tokens=2)
    assert (result.text, result.usage.prompt_tokens) == ("bc", len("u:x;a"))


def test_end_of_sequence_ends_the_answer_without_its_text(client):
    result = client.generate([254], max_tokens=50)
    assert (result.token_ids, result.finish_reason) == ((255, EOS), "stop")
    assert client.generate([254], max_tokens=4, ignore_eos=True).token_ids == toy(254, 4)


def test_stop_token_ids(client):
    result = client.generate("a", max_tokens=50, stop_token_ids=[ord("d")])
    assert (result.text, result.token_ids, result.finish_reason) == ("bc", toy(97, 3), "stop")


def test_stop_string_is_cut_and_frees_the_worker(client):
    result = client.generate("a", max_tokens=500, temperature=0.3, stop=["zz", "def"])
    assert (result.text, result.finish_reason) == ("bc", "stop")
    assert result.usage.completion_tokens == 5
    eventually(lambda: quiet(client), AT_ONCE_S)


def test_one_stop_string_needs_no_list(client):
    assert client.generate("a", max_tokens=20, stop="fed def").text == "bcdefghijklmnopqrstu"
    assert client.generate("a", max_tokens=20, stop="def").text == "bc"


@pytest.mark.parametrize("message", [
    {"role": "user"}, {"content": "x"}, {"role": "user", "content": [{"text": "x"}]}, 5])
def test_a_message_that_is_none_is_refused_before_it_is_sent(client, message):
    with pytest.raises(TypeError, match="a role and a content"):
        client.generate([{"role": "user", "content": "x"}, message])


def test_a_prompt_may_be_an_array(client):
    assert client.generate(np.array([97, 98], np.int64), max_tokens=2).text == "cd"


def test_half_a_stop_string_at_the_end_is_text(client):
    result = client.generate("a", max_tokens=3, stop=["de"])
    assert (result.text, result.finish_reason) == ("bcd", "length")


def test_seed_is_drawn_and_reported(client):
    for seed in (0, 2**63 - 1, -2, -(2**63)):
        assert client.generate("a", max_tokens=1, seed=seed).usage.seed == seed
    assert client.generate("a", max_tokens=1).usage.seed != client.generate("a", max_tokens=1, seed=-1).usage.seed >= 0


def test_n_answers_come_in_one_stream_each_with_its_end(client):
    chunks = list(client.stream("a", n=3, temperature=0.01, max_tokens=5, seed=8))
    results = collect_all(chunks)
    assert [(r.index, r.text, r.finish_reason, r.usage.completion_tokens) for r in results] == [
        (i, "bcdef", "length", 5) for i in range(3)]
    assert sum(bool(c.finish_reason) for c in chunks) == 3 and {c.request_id for c in chunks} == {results[0].request_id}
    assert [r.usage.seed for r in results] == [seed_of(8, i) for i in range(3)] and results[0].usage.seed == 8
    with pytest.raises(ValueError, match="generate_all"):
        collect(chunks)


def test_abort_ends_all_n_answers_and_frees_their_id(client):
    stream = client.stream([1], n=3, **LASTING, request_id="all")
    chunks = [next(stream)]
    with pytest.raises(InvalidRequest, match="'all' is still running"):
        client.generate([1], request_id="all")
    client.abort("all")
    chunks += stream
    assert [r.finish_reason for r in collect_all(chunks)] == ["abort"] * 3
    eventually(lambda: quiet(client), AT_ONCE_S)
    assert client.generate([1], request_id="all", max_tokens=1).token_ids == (2,)


def test_client_that_leaves_ends_all_n_generations(client):
    stream = client.stream([1], n=4, **LASTING)
    next(stream)
    eventually(lambda: client.status().running_requests == 4)
    stream.close()
    eventually(lambda: quiet(client), AT_ONCE_S)
    assert client.generate([1], max_tokens=1).token_ids == (2,)


def test_echo_begins_the_answer_with_the_prompt(client):
    result = client.generate("xa", max_tokens=3, echo=True)
    assert (result.text, result.token_ids, result.prompt_token_ids) == ("xabcd", toy(97, 3), (120, 97))
    assert client.generate(list(b"ya"), max_tokens=3, echo=True).text == "yabcd"
    chat = client.generate([{"role": "user", "content": "x"}], max_tokens=1, echo=True)
    assert (chat.text, chat.usage.completion_tokens) == ("u:x;ab", 1)
    assert client.generate("xa", max_tokens=3, echo=True, stop=["xa", "c"]).text == "xab"
    assert client.generate([97, 0xE2, 0x82], max_tokens=1, echo=True).text == "a\u2083"  # E2 82 83


def test_logprobs_name_their_tokens(client):
    result = client.generate("xa", max_tokens=2, logprobs=2, prompt_logprobs=0)
    assert [(t.token_id, t.text, t.logprob, t.rank) for t in result.logprobs] == [(98, "b", -98, 1), (99, "c", -99, 1)]
    assert [(t.token_id, t.text, t.logprob, t.rank) for t in result.logprobs[0].top] == [
        (98, "b", -98, 1), (99, "c", -99, 2)]
    assert [(t.token_id, t.text, t.logprob, len(t.top)) for t in result.prompt_logprobs] == [(97, "a", -97, 0)]
    assert not client.generate("xa", max_tokens=2).logprobs
    cut = client.generate("a", max_tokens=9, logprobs=0, stop=["cd"])
    assert [t.token_id for t in cut.logprobs] == list(cut.token_ids) == [98, 99, 100]


def test_default_max_tokens_shrinks_to_what_fits(client):
    assert client.generate([1], ignore_eos=True).usage.completion_tokens == 128
    assert client.generate([1] * 500, ignore_eos=True).usage.completion_tokens == 12


@pytest.mark.parametrize("prompt, options, says", [
    ("", {}, "prompt is empty"),
    ([], {}, "prompt is empty"),
    ([1] * 500, {"max_tokens": 13}, r"prompt \(500 tokens\) \+ max_tokens \(13\) = 513 exceeds the context of 512"),
    ([1] * 512, {}, r"512 tokens\) \+ max_tokens \(1\)"),
    ("a" * (512 * 256 + 1), {}, "131073 characters, far more than the context of 512 tokens can hold"),
    ([1] * (512 * 256 + 1), {}, "131073 tokens, far more than the context of 512 tokens can hold"),
    ([{"role": "user", "content": "x"}] * 513, {}, "513 messages and tools, more than the context of 512 tokens can hold"),
    ([{"role": "user", "content": "ü" * 65536}], {}, "bytes, far more than the context of 512 tokens can hold"),
    ([VOCAB], {}, f"token id {VOCAB} is outside the vocabulary"),
    ([-1], {}, "token id -1 is outside"),
    ("a", {"temperature": -0.1}, r"temperature must be in \[0, 100\]"),
    ("a", {"temperature": float("nan")}, "temperature"),
    ("a", {"temperature": 101.0}, "temperature"),
    ("a", {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ("a", {"top_p": 1.1}, "top_p"),
    ("a", {"top_p": float("nan")}, "top_p"),
    ("a", {"top_k": -2}, "top_k must be at least 1, or 0 or -1"),
    ("a", {"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
    ("a", {"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, 100\], got 0"),
    ("a", {"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
    ("a", {"frequency_penalty": float("nan")}, r"frequency_penalty must be in \[-2, 2\], got nan"),
    ("a", {"logit_bias": {VOCAB: 1.0}}, f"logit_bias: token id {VOCAB} is outside the vocabulary"),
    ("a", {"logit_bias": {5: 101.0}}, r"logit_bias of token id 5 must be in \[-100, 100\], got 101"),
    ([1], {"logit_bias": {i - 100: 1.0 for i in range(301)}}, "logit_bias may have 300 tokens, got 301"),
    ("a", {"min_tokens": -1}, "min_tokens must be at least 0"),
    ("a", {"min_tokens": 9, "max_tokens": 8}, r"min_tokens must be at most max_tokens \(8\), got 9"),
    ("a", {"n": 0}, r"n must be in \[1, 64\], got 0"),
    ("a", {"n": 65, "temperature": 1.0}, r"n must be in \[1, 64\], got 65"),
    ("a", {"n": 2}, "n=2 greedy answers would be the same; set a temperature"),
    ("a", {"logprobs": 21}, r"logprobs must be in \[0, 20\], got 21"),
    ("a", {"prompt_logprobs": -1}, r"prompt_logprobs must be in \[0, 20\], got -1"),
    ("a", {"max_tokens": 0}, "max_tokens must be at least 1"),
    ("a", {"stop": ["x"] * 17}, "at most 16 stop strings, got 17"),
    ("a", {"stop": [""]}, "stop string is empty"),
    ("a", {"stop": ["x" * 1025]}, "1024 characters"),
    ("a", {"stop_token_ids": [VOCAB]}, "stop token id"),
    ("a", {"regex": "[a-"}, r"(?s)refuses the regex: .*unclosed character class"),
    ("a", {"json_schema": {"type": "strang"}}, "llguidance refuses the json_schema: Invalid type: strang"),
    ("a", {"json_schema": '"x"'}, "llguidance refuses the json_schema: Expecting object schema"),
    ("a", {"grammar": "start: foo"}, 'refuses the grammar: .*unknown name: "foo"'),
    ("a", {"grammar": "root ::= foo"}, "refuses the grammar: .*Rule 'foo' not found"),
    ("a", {"grammar": "x" * 200000}, "grammar may have 131072 bytes, got 200000"),
    ("a", {"choice": ["x", ""]}, "choice needs at least 1 text, and none may be empty"),
    ("a", {"choice": ["x"], "json_object": True}, "one of .*; got json_object and choice"),
    ([{"role": "wizard", "content": "x"}], {}, "unknown chat role 'wizard'; roles are system, user, assistant"),
])
def test_what_cannot_be_served_is_refused_with_the_limit(client, prompt, options, says):
    with pytest.raises(InvalidRequest, match=says):
        client.generate(prompt, **options)


def test_request_without_input_is_refused(cluster):
    with grpc.insecure_channel(cluster.address) as channel, pytest.raises(grpc.RpcError) as e:
        list(rpc.InferenceStub(channel).Generate(pb.GenerateRequest()))
    assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_model_names_the_served_ones(client):
    with pytest.raises(UnknownModel, match="served: toy"):
        client.generate("a", model="gpt")
    assert client.generate("a", model="toy", max_tokens=1).text == "b"


def test_client_that_leaves_ends_its_generation(client):
    stream = client.stream([1], **LASTING)
    next(stream)
    assert not quiet(client)
    stream.close()
    eventually(lambda: quiet(client), AT_ONCE_S)


def test_deadline_ends_the_generation(client):
    with pytest.raises(BlitzError) as e:
        client.generate([1], **LASTING, timeout_s=0.3)
    assert e.value.code == "DEADLINE_EXCEEDED"
    eventually(lambda: quiet(client), AT_ONCE_S)


def test_abort_ends_the_answer_with_what_it_has(client):
    stream = client.stream([1], **LASTING, request_id="mine")
    first = next(stream)
    client.abort("mine", "nobody's")
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    tokens = first.token_ids + tuple(t for c in rest for t in c.token_ids)
    assert tokens == toy(1, rest[-1].usage.completion_tokens)
    eventually(lambda: quiet(client), AT_ONCE_S)


def test_request_id_is_unique_while_it_runs_and_free_afterwards(client):
    stream = client.stream([1], **LASTING, request_id="mine")
    assert next(stream).request_id == "mine"
    with pytest.raises(InvalidRequest, match="'mine' is still running"):
        client.generate([1], request_id="mine")
    stream.close()
    for _ in range(20):
        eventually(lambda: quiet(client), AT_ONCE_S)
        assert client.generate([1], request_id="mine", max_tokens=1).token_ids == (2,)


def test_the_server_says_what_a_client_needs_to_come_back(cluster):
    """Whatever the client is written in: the seconds it has, and which errors are the server's own."""
    with grpc.insecure_channel(cluster.address) as channel:
        generate = rpc.InferenceStub(channel).Generate
        call = generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(max_tokens=1)))
        assert dict(call.initial_metadata())["blitzjax-resume-s"] == f"{RESUME_S}"
        assert [m.token_ids for m in call] == [[2]]
        for wrong, code in ((pb.GenerateRequest(text="a", request_id="nobody's", resume=True), "UNAVAILABLE"),
                            (pb.GenerateRequest(), "INVALID_ARGUMENT")):
            with pytest.raises(grpc.RpcError) as e:
                list(generate(wrong))
            assert e.value.code().name == code and dict(e.value.trailing_metadata())["blitzjax-final"] == "1"


def test_many_at_once_get_their_own_answers(cluster):
    import asyncio

    async def all_of_them():
        async with AsyncClient(cluster.address) as client:
            return await asyncio.gather(*(client.generate([i], max_tokens=20, ignore_eos=True) for i in range(40)))

    assert [r.token_ids for r in asyncio.run(all_of_them())] == [toy(i, 20) for i in range(40)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, VOCAB - 1), n=st.integers(1, 60),
       stop=st.lists(st.text("bcdxyz", min_size=1, max_size=2), max_size=2))
def test_any_answer_is_the_arithmetic_one(client, start, n, stop):
    result = client.generate([start], max_tokens=n, stop=stop, ignore_eos=True)
    assert result.token_ids == toy(start, result.usage.completion_tokens)
    assert not any(s in result.text for s in stop)
    assert result.finish_reason == "stop" or result.usage.completion_tokens == n


# ---- the cluster


def test_status_shows_model_and_instances(client):
    status = client.status()
    model = status.models[0]
    assert (model.name, model.layers, model.max_model_len, model.bytes) == ("toy", 4, 512, 60)
    assert {(i.phase, i.layers_loaded) for i in status.instances} >= {("serving", 4)}
    assert {i.id for i in status.instances} <= {"i0", "i1"}
    assert (status.live, status.source) == ("off", "multicast")


def test_scale_up_and_down_waits_until_it_is_done(client):
    reply = client.scale(2, source="disk", wait=True, timeout_s=300)
    assert (reply.serving, reply.target) == (2, 2) and reply.seconds > 0
    assert client.scale(1, wait=True, timeout_s=300).serving == 1
    eventually(lambda: sorted(i.phase for i in client.status().instances) == ["idle", "serving"])


def test_scale_back_waits_for_an_instance_that_still_loads(cluster, client):
    with ThreadPoolExecutor(1) as callers:
        with held(cluster):  # it would be done in no time
            client.scale(2, source="disk")
            waiting = callers.submit(client.scale, 1, wait=True, timeout_s=300)
            eventually(lambda: client.status().target_instances == 1)
            assert "loading" in {i.phase for i in client.status().instances}
            assert not waiting.done()
        assert waiting.result().serving == 1
    assert "loading" not in {i.phase for i in client.status().instances}
    eventually(lambda: sorted(i.phase for i in client.status().instances) == ["idle", "serving"])


def test_the_prompt_is_tokenized_as_generate_does(client):
    for prompt, text in (("ab", "ab"), ([97, 98], "ab"), ([{"role": "user", "content": "z"}], "u:z;a")):
        known = client.tokenize(prompt)
        assert (bytes(known.token_ids).decode(), known.text, known.max_model_len) == (text, text, 512)
        assert list(client.generate(prompt, max_tokens=1, echo=True).prompt_token_ids) == list(known.token_ids)
    with pytest.raises(InvalidRequest, match="at least 1 token"):
        client.tokenize("")


@pytest.mark.parametrize(("options", "says"), [
    ({"max_tokens": "5"}, "max_tokens must be int, got '5'"), ({"temperature": "hot"}, "temperature must be float, got 'hot'"),
    ({"top_k": 1, "stop": [5]}, r"stop must be str | Sequence[str], got [5]"), ({"model": 5}, "model must be str, got 5"),
    ({"logit_bias": {"a": 1}}, "logit_bias must be Mapping[int, float], got {'a': 1}"),
    ({"ignore_eos": "yes"}, "ignore_eos must be bool, got 'yes'"),
    ({"timeout_s": "5"}, "timeout_s must be float, got '5'"), ({"tools": [5]}, "tools must be functions, as OpenAI has them"),
    ({"max_token": 5}, "unknown options: max_token; there are max_tokens, "), ({"prompt": 5}, "chat of messages, got 5: "),
    ({"prompt": ["a"]}, "a prompt is text, token ids, or a chat of messages, got ['a']: "),
    ({"prompt": [{"role": "user"}]}, "a role and a content, both of them text; got {'role': 'user'}")])
def test_what_is_of_another_type_is_named(client: Client, options: dict, says: str) -> None:
    with pytest.raises(TypeError, match=re.escape(says)):
        client.generate(**{"prompt": "a"} | options)


@pytest.mark.parametrize("target", [0, -1, 3])
def test_scale_target_is_bounded_by_the_pool(client, target):
    with pytest.raises(InvalidRequest, match=r"\[1, 2\]: the pool has 2 workers"):
        client.scale(target)


def test_scale_refuses_unknown_modes(client):
    with pytest.raises(InvalidRequest, match="live must be one of zigzag, best_effort, off"):
        client.scale(1, live="sometimes")
    with pytest.raises(InvalidRequest, match="source must be one of"):
        client.scale(1, source="ether")


def test_watch_shows_instances_that_come_and_go_and_what_stays(client):
    pictures, enough = [], threading.Event()

    def look():
        for picture in client.watch():
            pictures.append(picture)
            if enough.is_set():
                return

    def seen(serving: int) -> bool:
        return bool(pictures) and sum(i.phase == "serving" for i in pictures[-1].instances) == serving

    watcher = threading.Thread(target=look)
    watcher.start()
    client.scale(2, wait=True, timeout_s=300)
    eventually(lambda: seen(2))
    client.scale(1, wait=True, timeout_s=300)
    eventually(lambda: seen(1))
    before = len(pictures)
    eventually(lambda: len(pictures) > before + 2)  # also when nothing changes
    enough.set()
    watcher.join()
    assert min(b.at - a.at for a, b in zip(pictures, pictures[1:], strict=False)) > 0.03
    with pytest.raises(BlitzError, match="not answered in time"):
        list(client.watch(timeout_s=0.1))


def test_reflection_lists_services(cluster):
    with grpc.insecure_channel(cluster.address) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask])))
    names = {s.name for s in answer.list_services_response.service}
    assert {"blitzjax.v1.Inference", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("name", ["", "blitzjax.v1.Inference"])
def test_health_knows_both_names(cluster, name):
    with grpc.insecure_channel(cluster.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING

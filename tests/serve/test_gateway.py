"""OpenAI's interface over real sockets, in front of the real controller and toy workers: the answers are known."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from test_frontend import LASTING, SLOW, quiet, toy
from toy import AT_ONCE_S, eventually, held, toy_config, toy_launch, wait_whole

from blitzjax.serve.client import AsyncClient
from blitzjax.serve.gateway import Gateway
from blitzjax.serve.hosts import free_ports
from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import inference_pb2 as pb

PAGE = "https://chat.example.org"


class Site:
    """What a client sees at one port."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, object, dict[str, str]]:
        """→ status, parsed body or None, headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            said = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(said) if said and is_json else None, dict(response.headers)
        except ConnectionRefusedError:
            return 0, None, {}
        finally:
            connection.close()

    def post(self, path: str, **body: object) -> dict:
        status, said, _ = self.ask("POST", path, body)
        assert status == 200, said
        return said

    def complete(self, prompt: object, **body: object) -> dict:
        return self.post("/v1/completions", **{"prompt": prompt, "temperature": 0, **body})

    def events(self, path: str, **body: object) -> list[dict]:
        """Of a stream that ends as it should, and whose chunks have its request's id."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and response.headers["Content-Type"] == "text/event-stream"
        name = response.headers["X-Request-Id"]
        lines = [line for line in response.read().decode().split("\n\n") if line]
        connection.close()
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert all(event["id"].endswith(f"cmpl-{name}") for event in events)
        return events


@pytest.fixture(scope="module")
def site(model_dir, tmp_path_factory) -> Iterator[Site]:
    """`blitzjax serve --http-port`."""
    [port] = free_ports(1)
    launch = toy_launch(tmp_path_factory.mktemp("run"))
    config = toy_config(f"serve.http_port={port}", f'serve.allowed_origins=["{PAGE}"]')
    with LocalCluster(config, model_dir, launch) as cluster:
        wait_whole(cluster)
        site = Site(port)
        site.cluster = cluster
        eventually(lambda: site.ask("GET", "/health")[0] == 200)
        yield site
        assert cluster.stop(300) == 0, cluster.tail("controller")


def test_completion(site):
    said = site.complete("a", max_tokens=5)
    assert said["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": "bcdef"}]
    assert (said["object"], said["model"]) == ("text_completion", "toy") and said["id"].startswith("cmpl-")
    assert said["usage"] == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6,
                             "prompt_tokens_details": {"cached_tokens": 0}}
    assert site.complete("a")["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_prompts_are_texts_or_tokens_one_or_many(site):
    assert site.complete([97], max_tokens=2)["choices"][0]["text"] == "bc"
    for prompts in (["a", "m"], [[97], [109]]):
        said = site.complete(prompts, max_tokens=2)
        assert [(c["index"], c["text"]) for c in said["choices"]] == [(0, "bc"), (1, "no")]
        assert said["usage"]["prompt_tokens"] == 2 and said["usage"]["completion_tokens"] == 4
    said = site.complete(["a", "m"], max_tokens=1, n=2, temperature=0.001)
    assert [c["index"] for c in said["choices"]] == [0, 1, 2, 3]


def test_a_body_may_have_more_prompts_than_may_wait(site):
    assert site.cluster.config.serve.max_queued_requests == 1024
    said = site.complete([[97 + k % 20] for k in range(1400)], max_tokens=1)
    assert [c["text"] for c in said["choices"]] == [chr(98 + k % 20) for k in range(1400)]
    assert said["usage"]["completion_tokens"] == 1400


def test_chat(site):
    messages = [{"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                {"role": "user", "content": "z"}]
    said = site.post("/v1/chat/completions", messages=messages, max_completion_tokens=2, temperature=0, user="me",
                     prompt_cache_retention="24h")
    assert said["choices"][0]["message"] == {"role": "assistant", "content": "bc"}
    assert said["usage"]["prompt_tokens"] == len("s:xy;u:z;a") and said["object"] == "chat.completion"


def test_chat_without_a_limit_may_fill_the_context(site):
    said = site.post("/v1/chat/completions", messages=[{"role": "user", "content": "z"}], temperature=0, ignore_eos=True)
    assert said["choices"][0]["finish_reason"] == "length" and said["usage"]["total_tokens"] == 512


def test_a_stream_has_what_the_whole_has(site):
    for path, asked in (("/v1/completions", {"prompt": ["a", "m"]}),
                        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})):
        asked |= {"max_tokens": 6, "temperature": 0}
        whole = site.post(path, **asked)
        events = site.events(path, **asked, stream_options={"include_usage": True})
        assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
        texts, ends = {}, {}
        for choice in (c for e in events for c in e["choices"]):
            piece = choice["delta"]["content"] if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            ends[choice["index"]] = choice["finish_reason"]
        assert texts == {c["index"]: c["message"]["content"] if "message" in c else c["text"] for c in whole["choices"]}
        assert ends == {c["index"]: c["finish_reason"] for c in whole["choices"]}
    assert [e["choices"][0]["delta"].get("role") for e in events[:-1]] == ["assistant"] + [None] * (len(events) - 2)


def test_every_piece_of_a_stream_may_tell_its_answers_tokens_so_far(site):
    events = site.events("/v1/completions", prompt=["ab", "m"], max_tokens=4, temperature=SLOW,
                         stream_options={"include_usage": True, "continuous_usage_stats": True})
    for index, prompt in ((0, 2), (1, 1)):
        told = [e["usage"] for e in events for c in e["choices"] if c["index"] == index]
        assert all(u["prompt_tokens"] == prompt and u["total_tokens"] == prompt + u["completion_tokens"] for u in told)
        counts = [u["completion_tokens"] for u in told]
        assert counts == sorted(counts) and counts[-1] == 4
    assert events[-1]["usage"]["completion_tokens"] == 8


def test_tokens_are_streamed_as_they_come(site):
    """A machine that stalls may join some of them, but not every time."""
    for _ in range(5):
        events = site.events("/v1/completions", prompt="A", max_tokens=20, temperature=SLOW)
        assert "".join(e["choices"][0]["text"] for e in events).encode() == bytes(toy(65, 20))
        if len(events) > 4:
            return
    raise AssertionError("they came together")


def test_sampling_fields_reach_the_model(site):
    assert site.complete("a", max_tokens=9, stop="e")["choices"][0] | {"text": "bcd"} == site.complete(
        "a", max_tokens=9, stop=["e", "x"])["choices"][0]
    assert site.complete("a", max_tokens=9, stop_token_ids=[100])["choices"][0]["finish_reason"] == "stop"
    assert len(site.complete([254], max_tokens=6, ignore_eos=True)["choices"][0]["text"]) > 0
    assert site.complete([254], max_tokens=6)["usage"]["completion_tokens"] == 2


def test_whole_numbers_may_be_written_with_a_point(site):
    """As clients do whose numbers are all of one kind."""
    asked = {"max_tokens": 4.0, "seed": 7.0, "top_k": 5.0, "logprobs": 1.0, "n": 1.0, "stop_token_ids": [100.0]}
    for prompt in ([97.0], [[97.0]]):
        [choice] = site.complete(prompt, **asked)["choices"]
        assert (choice["text"], choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("bc", "stop", 3)
    messages = [{"role": "user", "content": "x"}]
    said = site.post("/v1/chat/completions", messages=messages, temperature=0, max_completion_tokens=2.0)
    assert said["usage"]["completion_tokens"] == 2 and site.post("/detokenize", tokens=[97.0]) == {"prompt": "a"}


def test_logprobs(site):
    scored = site.complete("ab", max_tokens=2, logprobs=2, echo=True)["choices"][0]
    assert scored["text"] == "abcd"
    logprobs = scored["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "d"] and logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    chat = site.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=2, temperature=0,
                     logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["bytes"], len(t["top_logprobs"])) for t in chat] == [("b", [98], 1), ("c", [99], 1)]


def test_of_a_prompt_alone_the_logprobs_are_told(site):
    """As who compares likelihoods asks for them."""
    for prompts in ("abc", [97, 98, 99], ["abc", "xy"]):
        asked = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0, "stop": "d"}
        said = site.post("/v1/completions", **asked)
        choice = said["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("abc", "length", ["a", "b", "c"])
        assert choice["logprobs"]["token_logprobs"] == [None, -98, -99]
        assert said["usage"]["completion_tokens"] == 0 < said["usage"]["prompt_tokens"]
        events = site.events("/v1/completions", **asked,
                             stream_options={"include_usage": True, "continuous_usage_stats": True})
        pieces = [c for e in events for c in e["choices"] if c["index"] == 0]
        assert "".join(c["text"] for c in pieces) == "abc" and [c["finish_reason"] for c in pieces] == [None, "length"]
        assert [name for c in pieces for name in c["logprobs"]["tokens"]] == ["a", "b", "c"]
        assert all(e["usage"]["completion_tokens"] == 0 for e in events) and events[-1]["usage"] == said["usage"]
    several = site.complete("ab", max_tokens=0, echo=True, n=2, temperature=0.001)
    assert [(c["index"], c["text"], c["logprobs"]) for c in several["choices"]] == [(0, "ab", None), (1, "ab", None)]
    status, said, _ = site.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 0})
    assert status == 400 and said["error"]["message"] == "max_tokens must be at least 1, got 0"


def test_an_echo_of_token_ids_has_the_texts_and_places_that_one_of_text_has(site):
    asked = {"max_tokens": 2, "temperature": 0, "logprobs": 0, "echo": True}
    for text in ("abc", "éa", "aÀé"):
        [by_text], [by_ids] = (site.complete(p, **asked)["choices"] for p in (text, list(text.encode())))
        assert by_ids == by_text
    half = ["a", *(f"bytes:\\x{byte}" for byte in ("e2", "82", "83", "84"))]
    for ids, tokens, offsets in (([97, 0xE2, 0x82], half, [0, 1, 1, 1, 2]),
                                 ([98, 256, 99], ["b", "<|eos|>", "c", "d", "e"], [0, 1, 1, 2, 3])):
        scored = site.complete(ids, **asked)["choices"][0]["logprobs"]
        assert (scored["tokens"], scored["text_offset"]) == (tokens, offsets)


def test_token_ids_are_told_to_who_asks(site):
    """Of the prompt once, and else nothing changes: without a tokenizer they are all there is."""
    asked = {"max_tokens": 3, "temperature": 0, "logprobs": 1}
    for echo in (False, True):
        for prompt in ("ab", [97, 98], [98, 0xE2]):
            plain = site.complete(prompt, **asked, echo=echo)["choices"][0]
            ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
            answer = [ids[-1] + k for k in (1, 2, 3)]
            told = site.complete(prompt, **asked, echo=echo, return_token_ids=True)["choices"][0]
            assert told == plain | {"prompt_token_ids": ids, "token_ids": answer}
            events = site.events("/v1/completions", prompt=prompt, **asked, echo=echo, return_token_ids=True)
            pieces = [event["choices"][0] for event in events]
            assert [token for piece in pieces for token in piece["token_ids"]] == answer
            assert [piece.get("prompt_token_ids") for piece in pieces] == [ids] + [None] * (len(pieces) - 1)
            assert "".join(piece["text"] for piece in pieces) == plain["text"]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    prompt = site.post("/tokenize", messages=chat["messages"])["tokens"]
    whole = site.post("/v1/chat/completions", **chat, return_token_ids=True)
    choice = whole["choices"][0]
    assert (whole["prompt_token_ids"], choice["token_ids"], choice["message"]["content"]) == (prompt, [98, 99, 100], "bcd")
    events = site.events("/v1/chat/completions", **chat, return_token_ids=True)
    assert [event.get("prompt_token_ids") for event in events] == [prompt] + [None] * (len(events) - 1)
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == [98, 99, 100]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "bcd"


def test_tokens_of_one_character_have_its_place(site):
    """Also where the prompt's first token is a part of one."""
    scored = site.complete("éaÀ", max_tokens=3, temperature=0, logprobs=1, echo=True)["choices"][0]
    parts = ["c3", "a9", "a", "c3", "80", "81", "82", "83"]  # the model says the next byte
    assert scored["logprobs"]["tokens"] == [part if part == "a" else f"bytes:\\x{part}" for part in parts]
    assert all(top[token] == max(top.values()) for top, token in zip(
        scored["logprobs"]["top_logprobs"][5:], scored["logprobs"]["tokens"][5:], strict=True))
    assert scored["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 3, 4, 5] and scored["text"].startswith("éaÀ\ufffd")


def test_special_tokens_have_their_names_in_logprobs_and_a_place_where_they_are_text(site):
    ended = site.complete([254], max_tokens=6, temperature=0, logprobs=2)["choices"][0]["logprobs"]
    assert ended["tokens"] == ["bytes:\\xff", "<|eos|>"]
    assert ended["top_logprobs"][0].keys() == {"bytes:\\xff", "<|eos|>"}
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
    for prompt, text, offsets in (("a<|eos|>b", "a<|eos|>bc", [0, 1, 8, 9]), ([256, 98, 256, 98], "bbc", [0, 0, 1, 1, 2])):
        scored = site.complete(prompt, **asked)["choices"][0]
        assert scored["text"] == text and scored["logprobs"]["text_offset"] == offsets
        assert "<|eos|>" in scored["logprobs"]["tokens"]


def test_a_streams_logprobs_are_those_of_the_whole(site):
    """Also where text is held back, because it may become a stop string."""
    asked = {"prompt": "ab", "max_tokens": 6, "temperature": SLOW, "logprobs": 1, "stop": "dx", "echo": True}
    whole = site.complete(**asked)["choices"][0]["logprobs"]
    events = site.events("/v1/completions", **asked)
    assert whole["text_offset"] == list(range(8))
    for name, values in whole.items():
        assert [value for event in events for value in event["choices"][0]["logprobs"][name]] == values


def test_logprobs_have_the_bytes_of_tokens_that_are_no_characters(site):
    said = site.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=40, temperature=0,
                     logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in said] == [[byte] for byte in toy(97, 40)] and said[-1]["token"] == "\ufffd"
    assert [other["bytes"] for other in said[-1]["top_logprobs"]] == [[137], [138]]


def test_models(site):
    status, said, _ = site.ask("GET", "/v1/models")
    assert status == 200 and [(m["id"], m["max_model_len"]) for m in said["data"]] == [("toy", 512)]
    assert site.ask("GET", "/v1/models/toy")[1]["id"] == "toy"
    assert site.ask("GET", "/v1/models/of/many")[1]["error"]["message"] == "no model 'of/many' is served; see /v1/models"
    assert site.ask("GET", "/version")[1].keys() == {"version"}


@pytest.mark.parametrize(("path", "body", "status", "says"), [
    ("/v1/completions", b"{", 400, "not JSON"),
    ("/v1/completions", [], 400, "must be a JSON object"),
    ("/v1/completions", {}, 400, "prompt must be"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt must be"),
    ("/v1/completions", {"prompt": ["a"] * 2049}, 400, "prompt may have 2048 texts"),
    ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "temprature is no field"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature must be int or float, got 'hot'"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n must be in [1, 64], got 0"),
    ("/v1/completions", {"prompt": "a", "n": True}, 400, "n must be int, got True"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens must be int, got 2.5"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": Infinity}', 400, "max_tokens must be int, got inf"),
    ("/v1/completions", {"prompt": [97.5]}, 400, "prompt must be"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [1, 2.5]}, 400, "stop_token_ids must be a list of token ids"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature must be in"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1}, 400, "prompt_logprobs is not supported"),  # echo shows them
    ("/v1/completions", {"prompt": "a", "suffix": "z"}, 400, "suffix is not supported"),
    ("/v1/completions", {"prompt": "a" * 600}, 400, "exceeds the context of 512"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "other"),
    ("/v1/completions", {"prompt": "a", "stream": True, "model": "other"}, 404, "other"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias must map"),
    ("/v1/chat/completions", {"messages": []}, 400, "at least 1 message"),
    ("/v1/chat/completions", {"messages": [{}] * 16385}, 400, "at most 16384 messages, got 16385"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}] * 16385}, 400,
     "at most 16384 tools, got 16385"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 8200}] * 2}, 400,
     "at most 16384 parts and tool_calls of messages, got 16400"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(k): 1 for k in range(16385)}}, 400, "at most 16384 logit_bias"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a"] * 16385}}, 400, "at most 16384 choice"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "unknown chat role 'robot'"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type text"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "needs logprobs"),
    ("/v1/chat/completions", {"messages": [{"role": "ü" * 9000, "content": "x"}]}, 400, "unknown chat role 'üü"),
    ("/v1/completions", {"prompt": "a", "model": "m" * 20000}, 404, "no model 'mm"),
    ("/v1/completions", {"prompt": "a", "tools": [{}]}, 400, "tools is not supported"),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "response_format must have type"),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
     400, "llguidance refuses the json_schema"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "[a-"}}, 400, "unclosed character class"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, 400,
     "use one"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": 1}}, 400, "regex must be str"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"structural_tag": "x"}}, 400, "structural_tag is not supp"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": [1]}}, 400, "choice must be a string or a list"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, 400, "json_schema and regex"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options needs stream: true"),
    ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"include_usage": "yes"}}, 400,
     "stream_options.include_usage must be bool, got 'yes'"),
    ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"usage": True}}, 400,
     "stream_options.usage is no field"),
    ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, 400,
     "stream_options.include_obfuscation is not supported; leave it out"),
    ("/v1/embeddings", {"input": "x"}, 404, "POST /v1/embeddings is not there"),
])
def test_mistakes_are_named_in_openais_form(site, path, body, status, says):
    got, said, headers = site.ask("POST", path, body, **{"X-Request-Id": "mine"})
    assert got == status and says in said["error"]["message"], said
    assert said["error"]["code"] == status and headers["X-Request-Id"] == "mine" and len(said["error"]["message"]) < 2100
    assert site.ask("GET", path)[0] in (404, 405)


def test_a_wrong_method_and_a_body_that_is_too_large_are_told_what_to_do(site):
    status, said, headers = site.ask("PUT", "/v1/completions", {})
    assert (status, headers["Allow"], said["error"]["message"]) == (405, "POST", "/v1/completions takes POST, not PUT")
    status, said, headers = site.ask("DELETE", "/v1/models")
    assert status == said["error"]["code"] == 405 and headers["Allow"] == "GET, HEAD"
    status, said, _ = site.ask("POST", "/v1/completions", b'"' + b"a" * (64 << 20) + b'"')
    assert (status, said["error"]["message"]) == (413, "a body may have 64 MiB; send less at once")


def test_a_request_has_the_id_that_it_came_with_or_gets_one(site):
    for given in ("mine", "mine", ""):  # of the second the first may still be known
        _, said, headers = site.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2},
                                    **({"X-Request-Id": given} if given else {}))
        name = headers["X-Request-Id"]
        assert said["id"] == f"cmpl-{name}" and (name == given or len(name) == 32 and not given)


def test_bodies_of_many_prompts_wait_for_each_other(site):
    """All of them together are more than may wait."""
    with ThreadPoolExecutor(4) as threads:
        bodies = [threads.submit(site.complete, ["ab"] * 300, max_tokens=1, temperature=SLOW) for _ in range(4)]
        assert [len(body.result()["choices"]) for body in bodies] == [300] * 4


def test_tokens_of_a_prompt_and_back(site):
    assert site.post("/tokenize", prompt="ab", add_special_tokens=True) == {
        "tokens": [97, 98], "count": 2, "max_model_len": 512}
    said = site.post("/tokenize", model="toy", messages=[{"role": "user", "content": "z"}])
    assert bytes(said["tokens"]) == b"u:z;a"
    assert site.post("/detokenize", tokens=said["tokens"]) == {"prompt": "u:z;a"}
    assert site.post("/detokenize", tokens=[97, 256, 98]) == {"prompt": "a<|eos|>b"}
    for path, body, status, says in (
            ("/tokenize", {}, 400, "either prompt, a text, or messages"),
            ("/tokenize", {"prompt": "a", "messages": []}, 400, "either prompt, a text, or messages"),
            ("/tokenize", {"prompt": "a", "add_special_tokens": False}, 400, "add_special_tokens is not supported"),
            ("/tokenize", {"prompt": "a", "tools": [{}]}, 400, "tools is not supported"),
            ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools[0] must be"),
            ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, 400,
             "add_special_tokens is not supported with messages but as false"),
            ("/tokenize", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
            ("/detokenize", {"tokens": [999]}, 400, "outside the vocabulary"),
            ("/detokenize", {"tokens": "ab"}, 400, "tokens must be list"),
            ("/detokenize", {}, 400, "at least 1")):
        got, said, _ = site.ask("POST", path, body)
        assert got == status and says in said["error"]["message"], said


def test_a_cluster_that_is_away_is_said_so() -> None:
    async def ask() -> tuple[int, str, dict]:
        async with AsyncClient("127.0.0.1:1") as client, TestServer(Gateway(client, "").application()) as server:
            async with aiohttp.ClientSession(server.make_url("/")) as session, session.get("/v1/models") as answer:
                return answer.status, answer.headers["Retry-After"], await answer.json()

    status, retry, said = asyncio.run(ask())
    assert (status, retry, said["error"]["message"]) == (503, "1", "nothing listens on 127.0.0.1:1")


def test_a_bug_is_answered_in_openais_form_and_logged_by_request(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(AsyncClient):
        async def status(self, timeout_s: float | None = None) -> pb.ClusterStatus:
            raise ZeroDivisionError("nobody expects it")

    async def ask() -> tuple[int, dict]:
        async with Broken("127.0.0.1:1") as client, TestServer(Gateway(client, "").application()) as server:
            async with aiohttp.ClientSession(server.make_url("/")) as session:
                async with session.get("/v1/models", headers={"X-Request-Id": "mine"}) as answer:
                    return answer.status, await answer.json()

    status, said = asyncio.run(ask())
    assert status == said["error"]["code"] == 500 and "request mine" in said["error"]["message"]
    assert "nobody expects it" not in said["error"]["message"] and "ZeroDivisionError: nobody expects it" in caplog.text


def test_a_reader_that_leaves_ends_its_generation(site):
    with site.cluster.client() as client:
        for stream in (True, False):
            body = json.dumps({"prompt": "a", **LASTING, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", site.port)) as reader:
                reader.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                eventually(lambda: client.status().running_requests == 1)
            eventually(lambda: quiet(client), AT_ONCE_S)
            assert not client.status().running_requests


def test_an_answer_survives_the_controllers_crash(site):
    with site.cluster.client() as client, ThreadPoolExecutor(1) as readers:
        with held(site.cluster):
            reading = readers.submit(site.events, "/v1/completions", prompt="A", max_tokens=40, temperature=0)
            eventually(lambda: client.status().running_requests == 1)
            site.cluster.signal_controller()
        events = reading.result()
    assert "".join(e["choices"][0]["text"] for e in events).encode() == bytes(toy(65, 40))
    eventually(lambda: site.ask("GET", "/health")[0] == 200)


@contextlib.contextmanager
def gateway(site: Site, *flags: str, key: str = "") -> Iterator[Site]:
    """Another one, in front of the same cluster."""
    [port] = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "blitzjax.cli", "gateway", "--address", site.cluster.address,
                                "--port", str(port), *flags], env=os.environ | {"BLITZJAX_API_KEY": key})
    try:
        eventually(lambda: Site(port).ask("GET", "/health")[0] == 200)
        yield Site(port)
    finally:
        process.terminate()
        assert process.wait(300) == 0


def test_a_key_is_asked_for(site):
    with gateway(site, key="secret") as keyed:
        assert keyed.ask("GET", "/ping")[0] == 200 and keyed.ask("GET", "/v1/models")[0] == 401
        assert keyed.ask("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        assert keyed.ask("GET", "/v1/models", Authorization="Bearer secret")[0] == 200


ASKS_FIRST = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def told(site: Site, method: str, path: str, body: object = None, origin: str = PAGE,
         **headers: str) -> tuple[int, str | None]:
    """→ status, whose pages may read it."""
    status, _, said = site.ask(method, path, body, Origin=origin, **headers)
    return status, said.get("Access-Control-Allow-Origin")


def test_any_page_may_call_where_there_is_a_key(site):
    """Errors are for it, too, and a browser that asks first has no key."""
    with gateway(site, key="secret") as keyed:
        status, _, said = keyed.ask("OPTIONS", "/v1/chat/completions", Origin=PAGE, **ASKS_FIRST)
        assert (status, said["Access-Control-Allow-Origin"], said["Access-Control-Allow-Methods"]) == (204, "*", "GET, POST")
        assert said["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert told(keyed, "GET", "/v1/models") == (401, "*")
        assert told(keyed, "GET", "/v1/models", Authorization="Bearer secret") == (200, "*")
        assert told(keyed, "POST", "/v1/completions", b"{", Authorization="Bearer secret") == (400, "*")
        assert told(keyed, "GET", "/nowhere", Authorization="Bearer secret") == (404, "*")
        assert "Access-Control-Allow-Origin" not in keyed.ask("GET", "/ping")[2]


def test_without_a_key_only_pages_that_are_named_may_call(site):
    assert told(site, "OPTIONS", "/v1/completions", **ASKS_FIRST) == (204, PAGE)
    for stream in (False, True):
        assert told(site, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": stream}) == (200, PAGE)
    assert told(site, "OPTIONS", "/v1/completions", None, "https://example.org", **ASKS_FIRST) == (403, None)
    assert told(site, "GET", "/v1/models", None, "https://example.org") == (200, None)
    blind = {"prompt": "a", "max_tokens": 1}, "https://example.org"  # which a browser does not ask about
    assert told(site, "POST", "/v1/completions", *blind, **{"Content-Type": "text/plain"}) == (415, None)
    assert site.ask("GET", "/v1/models", Origin="https://example.org")[2]["Vary"] == "Origin"
    with gateway(site) as silent:
        status, said, _ = silent.ask("OPTIONS", "/v1/completions", Origin=PAGE, **ASKS_FIRST)
        assert status == 403 and "name it with --allowed-origins" in said["error"]["message"]
        assert told(silent, "GET", "/v1/models") == (200, None)


def test_without_a_controller_it_says_so():
    """At the port that it has found and told."""
    [nobody] = free_ports(1)
    gateway = subprocess.Popen([sys.executable, "-m", "blitzjax.cli", "gateway", "--address", f"127.0.0.1:{nobody}",
                                "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        alone = Site(int(gateway.stdout.readline().removesuffix("/v1\n").rpartition(":")[2]))
        eventually(lambda: alone.ask("GET", "/health")[0] == 503)
        status, said, headers = alone.ask("POST", "/v1/completions", {"prompt": "a", "model": "toy"})
        assert status == 503 and said["error"]["code"] == 503 and headers["Retry-After"] == "1"
    finally:
        gateway.terminate()
        assert gateway.wait(300) == 0


@pytest.mark.parametrize(("body", "says"), [
    ({"prompt": "a", "n": 1 << 40}, "n: Value out of range"),
    ({"prompt": "a", "seed": 1 << 63}, "seed: Value out of range"),
    ({"prompt": "a", "seed": -(1 << 63) - 1}, "seed: Value out of range"),
    ({"prompt": "a", "temperature": 10**400}, "temperature: int too large"),
    ({"prompt": "a", "logit_bias": {"1": 10**400}}, "logit_bias must map"),
    ({"prompt": "a", "logit_bias": {str(1 << 40): 1}}, "logit_bias: Value out of range"),
    ({"prompt": "a", "priority": 1 << 40}, "priority: Value out of range"),
    ({"prompt": "a\ud800", "max_tokens": 1}, "prompt: 'utf-8' codec"),
    ({"prompt": "a", "stop": "\udfff"}, "stop: 'utf-8' codec"),
    ({"prompt": "a", "model": "\udfff"}, "model: 'utf-8' codec"),
])
def test_values_that_no_request_can_hold_are_the_callers_error(site, body, says):
    for stream in (False, True):
        status, said, _ = site.ask("POST", "/v1/completions", body | {"stream": stream})
        assert status == 400 and says in said["error"]["message"], said
        assert said["error"]["type"] == "invalid_request_error"


def test_a_body_nested_without_end_is_the_callers_error(site):
    status, said, _ = site.ask("POST", "/v1/completions", b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    assert status == 400 and "not JSON" in said["error"]["message"]
    for encoded in ({"Content-Type": "application/json; charset=none"}, {"Content-Encoding": "gzip"}):
        status, said, _ = site.ask("POST", "/v1/completions", b"{}", **encoded)
        assert status == 400 and "not JSON" in said["error"]["message"]

"""Many calls of Generate in one: each begins, ends, fails and is left as one alone would be."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import uuid
from collections.abc import Iterator

import grpc
import pytest
from test_frontend import LASTING, SLOW, quiet, toy
from toy import eventually

from blitzjax.errors import BlitzError, InvalidRequest
from blitzjax.serve.asking import generate_request
from blitzjax.serve.client import AsyncClient
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc


class Caller:
    """Of one relay."""

    def __init__(self, address: str):
        self._channel = grpc.insecure_channel(address)
        self._requests: queue.Queue[pb.RelayRequest | None] = queue.Queue()
        self.call = rpc.InferenceStub(self._channel).Relay(iter(self._requests.get, None))

    def begin(self, number: int, prompt: list[int] | str, key: str = "", **options) -> str:
        """→ its request id."""
        request = generate_request(prompt, {"request_id": uuid.uuid4().hex, **options})
        request.key = key
        self._requests.put(pb.RelayRequest(call=number, generate=request))
        return request.request_id

    def leave(self, number: int) -> None:
        self._requests.put(pb.RelayRequest(call=number))

    def said(self) -> Iterator[pb.Relayed]:
        for message in self.call:
            yield from message.said

    def no_more(self) -> None:
        self._requests.put(None)

    def close(self) -> None:
        self.no_more()
        self.call.cancel()
        self._channel.close()


@pytest.fixture
def caller(cluster):
    with contextlib.closing(Caller(cluster.address)) as caller:
        yield caller


def test_each_call_has_its_answers_and_its_end(caller, client):
    lengths = {1: 3, 2: 30, 5: 1, 9: 12}
    for number, length in lengths.items():
        caller.begin(number, [number], max_tokens=length, temperature=SLOW if length > 3 else 0.0)
    caller.begin(10, "a", n=2, max_tokens=4, temperature=SLOW)
    caller.no_more()
    tokens: dict[tuple[int, int], tuple[int, ...]] = {}
    ended: dict[int, str] = {}
    for said in caller.said():
        assert said.call not in ended
        if said.HasField("end"):
            ended[said.call] = said.end.code
        else:
            place = said.call, said.response.index
            tokens[place] = (*tokens.get(place, ()), *said.response.token_ids)
    assert ended == dict.fromkeys((*lengths, 10), "OK")
    assert tokens == {**{(n, 0): toy(n, length) for n, length in lengths.items()}, (10, 0): toy(97, 4), (10, 1): toy(97, 4)}
    eventually(lambda: quiet(client))


def test_a_call_that_is_refused_or_aborted_ends_alone(caller, client):
    aborted = caller.begin(1, [1], **LASTING)
    caller.begin(2, [2], max_tokens=20, temperature=SLOW)
    said = caller.said()
    assert next(said).call in (1, 2)
    caller.begin(3, [], max_tokens=1)
    caller.begin(4, [1], max_tokens=1, model="none such")
    ends: dict[int, pb.CallEnd] = {}
    reasons = {}
    for one in said:
        if one.call == 4:
            client.abort(aborted)
        if one.HasField("end"):
            ends[one.call] = one.end
        elif one.response.finish_reason:
            reasons[one.call] = one.response.finish_reason
        if len(ends) == 4:
            break
    assert (ends[3].code, ends[4].code) == ("INVALID_ARGUMENT", "NOT_FOUND")
    assert "empty" in ends[3].message and "none such" in ends[4].message
    assert (ends[1].code, ends[2].code) == ("OK", "OK") and reasons == {1: "abort", 2: "length"}


def test_a_call_that_is_left_ends_without_a_word(caller, client):
    caller.begin(1, [1], key="secret", **LASTING)
    said = caller.said()
    next(said)
    caller.leave(1)
    caller.leave(7)  # never began
    eventually(lambda: quiet(client))
    caller.begin(2, [2], max_tokens=1)
    ends = []
    while not ends:
        ends = [(one.call, one.end.code) for one in (next(said),) if one.HasField("end")]
    assert ends == [(2, "OK")]


def test_a_number_may_be_used_once(caller, client):
    caller.begin(3, [1], **LASTING)
    said = caller.said()
    next(said)
    caller.begin(3, [1])
    with pytest.raises(grpc.RpcError, match="count upwards") as failed:
        list(said)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    eventually(lambda: quiet(client))


def test_what_a_relay_that_breaks_had_goes_to_who_comes_back_with_the_key(caller, cluster, client):
    kept = caller.begin(1, [1], key="secret", max_tokens=60, temperature=SLOW)
    caller.begin(2, [2], **LASTING)  # without a key: nobody can come back
    said, heard = caller.said(), set()
    while heard != {1, 2}:
        heard.add(next(said).call)
    caller.close()
    eventually(lambda: client.status().running_requests <= 1)  # the first one may be over
    request = generate_request([1], {"request_id": kept, "max_tokens": 60, "temperature": SLOW})
    request.key, request.resume = "secret", True
    with grpc.insecure_channel(cluster.address) as channel:
        messages = list(rpc.InferenceStub(channel).Generate(request))
    assert sum((tuple(m.token_ids) for m in messages), ()) == toy(1, 60) and messages[-1].usage.attempts == 1


def test_streams_of_a_client_share_one_call_and_fail_alone(cluster, client):
    async def asked():
        async with AsyncClient(cluster.address) as caller:
            opened = 0
            relay = caller._stub.Relay

            def counted(*args, **options):
                nonlocal opened
                opened += 1
                return relay(*args, **options)

            caller._stub.Relay = counted
            results = await asyncio.gather(
                *(caller.generate([k], max_tokens=5, temperature=SLOW) for k in range(8)), caller.generate([]),
                caller.generate([1], timeout_s=0.2, **LASTING), caller.generate("a" * (64 << 20)), return_exceptions=True)
            again = await caller.generate([9], max_tokens=2)
            return opened, results, again

    opened, results, again = asyncio.run(asked())
    assert opened == 1 and [r.token_ids for r in results[:8]] == [toy(k, 5) for k in range(8)]
    assert isinstance(results[8], InvalidRequest) and isinstance(results[9], BlitzError)
    assert isinstance(results[10], InvalidRequest) and "bytes, more than 67108864" in str(results[10])
    assert results[9].code == "DEADLINE_EXCEEDED" and again.token_ids == toy(9, 2)
    eventually(lambda: quiet(client))

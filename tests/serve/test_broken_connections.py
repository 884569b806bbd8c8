"""The connection between client and controller breaks while both live: the client gets its answer, whenever that was.

Between them is a real proxy, which a test cuts. What a worker says can be computed, see toy_worker.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from proxy import Proxy
from test_frontend import LASTING, quiet, toy
from toy import AT_ONCE_S, eventually, toy_config, toy_launch, wait_whole

from blitzjax.errors import BlitzError, Unavailable
from blitzjax.serve.asking import collect_all
from blitzjax.serve.client import AsyncClient, Client
from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

SLOW = 0.02  # pause of a toy worker before a token, in seconds


@pytest.fixture
def proxy(cluster: LocalCluster) -> Iterator[Proxy]:
    proxy = Proxy(cluster.address)
    yield proxy
    proxy.close()


def seats(client: Client) -> int:
    status = client.status()
    return status.queued_requests + status.running_requests


def tokens_of(chunks) -> tuple[int, ...]:
    return tuple(t for chunk in chunks for t in chunk.token_ids)


def streamed(address: str, proxy: Proxy, cuts: set[int], asynchronous: bool, silent: bool, **options) -> list:
    """The chunks of one answer. The connection is cut behind the chunks of these numbers, the first one's being 1."""
    def cut(number: int) -> None:
        if number in cuts:
            proxy.cut(silent)

    def blocking() -> list:
        chunks = []
        with Client(address) as client:
            client.status()  # says that it resumes
            for chunk in client.stream([1], **options):
                chunks.append(chunk)
                cut(len(chunks))
        return chunks

    async def looped() -> list:
        chunks = []
        async with AsyncClient(address) as client:
            await client.status()
            async for chunk in client.stream([1], **options):
                chunks.append(chunk)
                cut(len(chunks))
        return chunks

    return asyncio.run(looped()) if asynchronous else blocking()


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_is_whole_whenever_the_connection_breaks(cluster, client, proxy, asynchronous: bool, silent: bool):
    """Also if the server does not notice, so that the broken call has the answer when the client comes back for it."""
    for cuts in ({1}, {2}, {4, 5, 6}, {9}, {3, 10}):
        chunks = streamed(proxy.address, proxy, cuts, asynchronous, silent, max_tokens=10, temperature=SLOW, echo=True)
        assert tokens_of(chunks) == toy(1, 10)
        assert "".join(chunk.text for chunk in chunks) == "".join(map(chr, range(1, 12)))
        assert [chunk.prompt_token_ids for chunk in chunks if chunk.prompt_token_ids] == [(1,)]
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
        assert chunks[-1].usage.attempts == 1
    eventually(lambda: seats(client) == 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_connection_breaks_before_the_first_token(cluster, client, proxy, asynchronous: bool):
    others = client.stream([1], n=4, **LASTING)  # every slot
    next(others)
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(streamed, proxy.address, proxy, set(), asynchronous, False, max_tokens=3)
        eventually(lambda: client.status().queued_requests == 1)
        proxy.cut()
        others.close()
        chunks = answer.result(300)
    assert tokens_of(chunks) == toy(1, 3) and chunks[-1].usage.attempts == 1


def test_answers_that_end_while_the_client_is_away(cluster, client, proxy):
    with Client(proxy.address) as away:
        away.status()
        stream = away.stream([1], n=3, max_tokens=20, temperature=SLOW)
        chunks = [next(stream)]
        proxy.cut()
        eventually(lambda: seats(client) == 0)
        chunks += stream
        assert [answer.token_ids for answer in collect_all(chunks)] == [toy(1, 20)] * 3


def test_many_clients_behind_one_proxy_that_restarts(cluster, client, proxy):
    async def all_of_them() -> list:
        async with AsyncClient(proxy.address) as behind:
            await behind.status()
            async with asyncio.TaskGroup() as group:
                answers = [group.create_task(behind.generate([k], max_tokens=30, temperature=SLOW)) for k in range(12)]
                for _ in range(8):
                    await asyncio.sleep(SLOW * 4)
                    proxy.cut()
            return [answer.result().token_ids for answer in answers]

    assert asyncio.run(all_of_them()) == [toy(k, 30) for k in range(12)]
    eventually(lambda: seats(client) == 0)


def test_who_has_come_back_has_the_answer_alone(cluster):
    """A call that still lives ends when another one comes with its key, and leaves nothing to miss."""
    request = pb.GenerateRequest(request_id=uuid.uuid4().hex, key="mine", tokens=pb.TokenIds(ids=[1]),
                                 sampling=pb.SamplingParams(**LASTING))
    with grpc.insecure_channel(cluster.address) as channel:
        stub = rpc.InferenceStub(channel)
        early = stub.Generate(request)
        next(early)
        request.resume = True
        late = stub.Generate(request)
        with pytest.raises(grpc.RpcError) as e:
            list(early)
        assert e.value.code() is grpc.StatusCode.ABORTED
        first = next(late)
        stub.Abort(pb.AbortRequest(request_ids=[request.request_id]))
        had = tokens_of([first, *late])
        assert had == toy(1, len(had))
        assert tokens_of(stub.Generate(request)) == had
        request.key = "another's"
        with pytest.raises(grpc.RpcError, match="not known any more"):
            list(stub.Generate(request))


def test_who_closes_an_answer_or_its_client_frees_the_seat_at_once(cluster, client, proxy):
    async def cancelled() -> None:
        async with AsyncClient(proxy.address) as behind:
            reader = asyncio.create_task(behind.generate([1], **LASTING))
            await asyncio.to_thread(eventually, lambda: seats(client) == 1)
            reader.cancel()
            await asyncio.wait([reader])
            async for _ in behind.stream([1], **LASTING):
                break

    def closed() -> None:
        with Client(proxy.address) as behind:
            kept = behind.stream([1], **LASTING)
            next(kept)
            proxy.cut()
            next(kept)
            left.append(kept)

    def late() -> None:
        with Client(proxy.address) as behind, pytest.raises(BlitzError, match="has not answered in time"):
            behind.generate([1], **LASTING, timeout_s=0.3)

    left = []
    for leave in (lambda: asyncio.run(cancelled()), closed, late):
        leave()
        eventually(lambda: quiet(client), AT_ONCE_S)


def test_a_call_without_a_key_ends_with_its_connection(cluster, client, proxy):
    sampling = pb.SamplingParams(**LASTING)
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1]), sampling=sampling)
    with grpc.insecure_channel(proxy.address) as channel:
        call = rpc.InferenceStub(channel).Generate(request)  # kept: gRPC cancels a call that nobody holds
        next(call)
        assert seats(client) == 1
        proxy.cut()
        eventually(lambda: quiet(client), AT_ONCE_S)
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_scale_goes_on_over_a_new_connection(cluster, client, proxy):
    with Client(proxy.address) as behind, ThreadPoolExecutor(1) as caller:
        behind.status()
        scaled = caller.submit(behind.scale, 2, wait=True, timeout_s=300)
        proxy.cut()
        assert scaled.result(300).serving == 2
        client.scale(1, wait=True, timeout_s=300)


def test_what_nobody_comes_back_for_ends(model_dir, tmp_path):
    with LocalCluster(toy_config("serve.resume_timeout_s=0.5"), model_dir, toy_launch(tmp_path)) as cluster:
        wait_whole(cluster)
        proxy = Proxy(cluster.address)
        with cluster.client() as client, Client(proxy.address) as gone, ThreadPoolExecutor(1) as caller:
            gone.status()
            answer = caller.submit(gone.generate, [1], **LASTING, request_id="mine")
            eventually(lambda: seats(client) == 1)
            proxy.close()
            with pytest.raises(Unavailable):
                answer.result(300)
            eventually(lambda: quiet(client), AT_ONCE_S)
            assert client.generate([1], max_tokens=2, request_id="mine").token_ids == toy(1, 2)
        assert cluster.stop(300) == 0, cluster.tail("controller")

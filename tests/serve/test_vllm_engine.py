"""vLLM's gRPC interface over real sockets: the same answers as through our own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import accumulate

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_frontend import LASTING, quiet, toy
from toy import AT_ONCE_S, BOS, EOS, VOCAB, eventually, held, toy_config

from blitzjax.serve.controller import Controller
from blitzjax.serve.resume import with_journal
from blitzjax.serve.vllm_engine import VllmEngine
from blitzjax.v1 import vllm_engine_pb2 as vllm
from blitzjax.v1 import vllm_engine_pb2_grpc as rpc


@pytest.fixture(scope="module")
def stub(cluster):
    with grpc.insecure_channel(cluster.address) as channel:
        yield rpc.VllmEngineStub(channel)


def call(stub, prompt, stream=False, **sampling) -> Iterator[vllm.GenerateResponse]:
    given = {"text": prompt} if isinstance(prompt, str) else {"tokenized": {"input_ids": prompt}}
    sampling = {"temperature": 0.0, "max_tokens": 5} | sampling
    return stub.Generate(vllm.GenerateRequest(
        stream=stream, sampling_params=vllm.SamplingParams(**sampling), **given), timeout=300)


def ask(stub, prompt, **sampling) -> list[vllm.GenerateResponse]:
    return list(call(stub, prompt, **sampling))


def test_whole_answer(stub):
    [response] = ask(stub, [97])
    done = response.complete
    assert tuple(done.output_ids) == toy(97, 5) and done.finish_reason == "length"
    assert (done.prompt_tokens, done.completion_tokens, done.index) == (1, 5, 0)
    assert ask(stub, "a") == [response]


def test_stream_and_its_end(cluster, stub):
    with held(cluster):
        first = next(running := call(stub, [97], stream=True, max_tokens=20))
    *chunks, last = first, *running
    assert len(chunks) > 1 and sum((tuple(r.chunk.token_ids) for r in chunks), ()) == toy(97, 20)
    assert [r.chunk.completion_tokens for r in chunks] == list(accumulate(len(r.chunk.token_ids) for r in chunks))
    assert tuple(last.complete.output_ids) == toy(97, 20)


def test_what_nobody_said_is_vllms_default(stub):
    [response] = list(stub.Generate(vllm.GenerateRequest(
        text="a", sampling_params=vllm.SamplingParams(temperature=0.0)), timeout=300))
    assert response.complete.finish_reason == "stop"  # the whole context was there, and the toy came to its end
    assert response.complete.matched_token_id == EOS
    assert len(response.complete.output_ids) == EOS - 97


def test_n_answers_and_stops(stub):
    answers = ask(stub, [97], n=3, temperature=0.001)
    assert sorted(r.complete.index for r in answers) == [0, 1, 2]
    [stopped] = ask(stub, [97], max_tokens=20, stop_token_ids=[101])
    assert (tuple(stopped.complete.output_ids), stopped.complete.matched_token_id) == (toy(97, 4), 101)
    for stream in (False, True):  # both are complete with the same token
        *_, by_text = call(stub, [97], stream, max_tokens=20, stop=["x", "e", "de"], stop_token_ids=[102])
        assert (by_text.complete.finish_reason, by_text.complete.matched_stop_str) == ("stop", "de")
    [neither] = ask(stub, [97], max_tokens=2, stop=["e"])
    assert neither.complete.finish_reason == "length" and not neither.complete.WhichOneof("matched_stop")


def test_logprobs_of_answer_and_prompt(stub):
    [response] = ask(stub, [97, 98, 99], logprobs=2, prompt_logprobs=1, max_tokens=2)
    out, given = response.complete.output_logprobs, response.complete.input_logprobs
    assert tuple(out.token_ids) == toy(99, 2) and len(out.token_logprobs) == 2
    assert all(len(top.token_ids) <= 2 for top in out.top_logprobs)
    assert tuple(given.token_ids) == (97, 98, 99)
    assert [known.HasField("value") for known in given.token_logprobs] == [False, True, True]


def test_abort_and_a_caller_that_leaves(stub, client):
    running = stub.Generate(vllm.GenerateRequest(
        request_id="mine", stream=True, tokenized={"input_ids": [97]},
        sampling_params=vllm.SamplingParams(**LASTING)))
    next(running)
    stub.Abort(vllm.AbortRequest(request_ids=["mine", "unknown"]))
    assert list(running)[-1].complete.finish_reason == "abort"
    left = stub.Generate(vllm.GenerateRequest(
        stream=True, tokenized={"input_ids": [97]}, sampling_params=vllm.SamplingParams(**LASTING)))
    next(left)
    left.cancel()
    eventually(lambda: quiet(client), AT_ONCE_S)


@pytest.mark.parametrize(("sampling", "says"), [
    ({"structural_tag": "{}"}, "structural_tag is not supported"), ({"choice": {"choices": []}}, "at least 1 text"),
    ({"json_schema": "{"}, "refuses the json_schema: EOF"), ({"regex": "[a-"}, "unclosed character"),
    ({"temperature": -1.0}, "temperature must be"), ({"stop_token_ids": [VOCAB]}, "outside the vocabulary")])
def test_what_is_not_done_is_refused(stub, sampling, says):
    with pytest.raises(grpc.RpcError) as refused:
        ask(stub, [97], **sampling)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and says in refused.value.details()


@pytest.mark.parametrize(("prompt", "sampling"), [
    ([1 << 31], {}), ([97], {"top_k": 1 << 31}), ([97], {"stop_token_ids": [1 << 31]}), ([97], {"n": 1 << 31})])
def test_numbers_beyond_ours_are_refused(stub, prompt, sampling):
    with pytest.raises(grpc.RpcError) as refused:
        ask(stub, prompt, **sampling)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_model_server_and_load(stub, cluster):
    info = stub.GetModelInfo(vllm.GetModelInfoRequest())
    assert (info.served_model_name, info.max_context_length, info.vocab_size) == ("toy", 512, VOCAB)
    assert (list(info.eos_token_ids), info.bos_token_id) == ([EOS], BOS)
    assert info.is_generation and info.tokenizer_path == info.model_path
    assert stub.GetServerInfo(vllm.GetServerInfoRequest()).max_num_seqs == 4
    assert stub.HealthCheck(vllm.HealthCheckRequest()).healthy
    with grpc.insecure_channel(cluster.address) as channel:
        asked = health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine")
        assert health_pb2_grpc.HealthStub(channel).Check(asked).status == health_pb2.HealthCheckResponse.SERVING
    running = stub.Generate(vllm.GenerateRequest(
        stream=True, tokenized={"input_ids": [97]}, sampling_params=vllm.SamplingParams(**LASTING)))
    next(running)
    eventually(lambda: stub.GetLoads(vllm.GetLoadsRequest()).loads[0].num_running_reqs == 1)
    [load] = stub.GetLoads(vllm.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.num_total_reqs, load.max_running_requests) == (1, 1, 4)
    assert 0 < load.num_used_tokens <= load.max_total_num_tokens and 0 < load.token_usage < 1
    running.cancel()


def test_without_a_model_it_says_so() -> None:
    async def ask() -> None:
        controller = with_journal(lambda: Controller(toy_config(), [], {"i0": "127.0.0.1:1"}), None)
        server = grpc.aio.server()
        rpc.add_VllmEngineServicer_to_server(VllmEngine(controller), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                await rpc.VllmEngineStub(channel).GetModelInfo(vllm.GetModelInfoRequest())
            finally:
                await server.stop(0)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(ask())
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND

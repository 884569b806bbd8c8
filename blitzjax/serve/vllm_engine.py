"""vLLM's gRPC engine interface, so that gateways made for it route to us: tokens in, tokens out.

A second face of the same requests: each becomes one of ours, with vLLM's defaults. It names no model, so it gets the one
that was deployed first. Invariant: as in frontend.py, every Generate ends with its last messages or a status.
"""

from __future__ import annotations

import datetime
import typing
from collections.abc import Sequence

import grpc

import blitzjax
from blitzjax.errors import InvalidRequest, UnknownModel
from blitzjax.serve.answers import Answer, Piece
from blitzjax.serve.streams import abort, answering, pieces
from blitzjax.types import Phase, TokenLogprob
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import vllm_engine_pb2 as vllm
from blitzjax.v1 import vllm_engine_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller

SERVICE = "vllm.grpc.engine.VllmEngine"
_SAME = ("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos")  # 0 is off here and there
_OFF_AT_ZERO = ("top_p", "repetition_penalty", "n")  # 0 means that nobody said
_TAKES = (Phase.SERVING, Phase.LIVE)
_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed")


class VllmEngine(rpc.VllmEngineServicer):
    """Holds no state of its own."""

    def __init__(self, controller: Controller):
        self._controller = controller

    async def Generate(self, request: vllm.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with answering(lambda: _ours(request), self._controller, context) as (answers, _):
            await self._stream(answers, request.stream, context)

    async def _stream(self, answers: tuple[Answer, ...], stream: bool, context: grpc.aio.ServicerContext) -> None:
        whole = {answer.index: Piece() for answer in answers}
        async for answer, piece, last in pieces(answers, self._controller):
            so_far = whole[answer.index]
            so_far.token_ids += piece.token_ids
            so_far.logprobs += piece.logprobs
            so_far.prompt_logprobs = so_far.prompt_logprobs or piece.prompt_logprobs
            if stream and piece.token_ids:
                await context.write(vllm.GenerateResponse(chunk=vllm.GenerateStreamChunk(
                    token_ids=piece.token_ids, output_logprobs=_output_logprobs(piece), **_counts(answer),
                    input_logprobs=_input_logprobs(answer, piece.prompt_logprobs))))
            if last:
                await context.write(vllm.GenerateResponse(complete=_complete(answer, so_far)))

    async def HealthCheck(self, request: vllm.HealthCheckRequest,
                          context: grpc.aio.ServicerContext) -> vllm.HealthCheckResponse:
        healthy = self._controller.ready and not self._controller.draining
        return vllm.HealthCheckResponse(healthy=healthy, message="" if healthy else "no instance serves")

    async def Abort(self, request: vllm.AbortRequest, context: grpc.aio.ServicerContext) -> vllm.AbortResponse:
        for request_id in request.request_ids:
            self._controller.abort(request_id)
        return vllm.AbortResponse()

    async def GetModelInfo(self, request: vllm.GetModelInfoRequest,
                           context: grpc.aio.ServicerContext) -> vllm.GetModelInfoResponse:
        try:
            model = self._controller.find("")
        except UnknownModel as e:
            await abort(context, e)
        spec, room, directory = model.spec, self._controller.context_tokens(model), str(model.directory)
        bos = None if model.tokenizer is None else model.tokenizer.bos
        return vllm.GetModelInfoResponse(
            model_path=directory, tokenizer_path=directory if model.tokenizer is not None else "", is_generation=True,
            max_context_length=room, max_req_input_len=room - 1, vocab_size=spec.vocab, served_model_name=model.name,
            model_type=spec.family, eos_token_ids=spec.eos_token_ids, bos_token_id=bos or 0)

    async def GetServerInfo(self, request: vllm.GetServerInfoRequest,
                            context: grpc.aio.ServicerContext) -> vllm.GetServerInfoResponse:
        status, engine = self._controller.status(), self._controller.config.engine
        return vllm.GetServerInfoResponse(
            active_requests=status.queued + status.running, uptime_seconds=self._controller.now(),
            server_type="blitzjax", data_parallel_size=1, model_dtype=engine.dtype, max_num_seqs=engine.max_num_seqs)

    async def GetLoads(self, request: vllm.GetLoadsRequest,
                       context: grpc.aio.ServicerContext) -> vllm.GetLoadsResponse:
        """Of all instances together: they are one engine to a gateway, whose size changes."""
        status, engine = self._controller.status(), self._controller.config.engine
        serving = [i for i in status.instances if i.phase in _TAKES]
        used, total = (sum(getattr(i, name) for i in serving) for name in ("pages_used", "pages_total"))
        waiting = status.queued + sum(i.waiting for i in serving)
        running = sum(i.running for i in serving)
        return vllm.GetLoadsResponse(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(), version=blitzjax.__version__, dp_rank_count=1,
            loads=[vllm.SchedulerLoad(
                num_running_reqs=running, num_waiting_reqs=waiting, num_total_reqs=running + waiting,
                num_used_tokens=used * engine.page_size, max_total_num_tokens=total * engine.page_size,
                token_usage=used / total if total else 0.0, max_running_requests=engine.max_num_seqs * len(serving))])


def _ours(request: vllm.GenerateRequest) -> pb.GenerateRequest:
    """`translated`; vLLM's numbers without a sign may be larger than any of ours."""
    try:
        return translated(request)
    except ValueError as e:
        raise InvalidRequest(str(e)) from e


def translated(request: vllm.GenerateRequest) -> pb.GenerateRequest:
    """As one of ours. Raises InvalidRequest for what is not done here."""
    given = request.sampling_params
    constraint = given.WhichOneof("constraint")
    if constraint == "structural_tag":
        raise InvalidRequest("structural_tag is not supported; use json_schema, regex, grammar, json_object or choice")
    sampling = pb.SamplingParams(
        temperature=given.temperature if given.HasField("temperature") else 1.0, fill_context=True, stop=given.stop,
        stop_token_ids=given.stop_token_ids, logit_bias=given.logit_bias,
        **{name: getattr(given, name) for name in _SAME}, **_constraint(given, constraint),
        **{name: value for name in _OFF_AT_ZERO if (value := getattr(given, name))},
        **{name: getattr(given, name) for name in _OPTIONAL if given.HasField(name)})
    out = pb.GenerateRequest(request_id=request.request_id, sampling=sampling)
    if request.WhichOneof("input") == "text":
        out.text = request.text
    else:
        out.tokens.ids.extend(request.tokenized.input_ids)
    return out


def _constraint(given: vllm.SamplingParams, kind: str | None) -> dict[str, typing.Any]:
    match kind:
        case None:
            return {}
        case "choice":
            return {kind: pb.Choices(choices=given.choice.choices)}
    return {kind: getattr(given, kind)}


def _counts(answer: Answer) -> dict[str, typing.Any]:
    return {"index": answer.index, "prompt_tokens": answer.request.prompt_tokens, "cached_tokens": answer.cached_tokens,
            "completion_tokens": len(answer.generated)}


def _complete(answer: Answer, whole: Piece) -> vllm.GenerateComplete:
    out = vllm.GenerateComplete(
        output_ids=whole.token_ids, finish_reason=answer.finish_reason, output_logprobs=_output_logprobs(whole),
        input_logprobs=_input_logprobs(answer, whole.prompt_logprobs), **_counts(answer))
    if answer.stop_string:
        out.matched_stop_str = answer.stop_string
    elif answer.finish_reason == "stop" and whole.token_ids and answer.ends(whole.token_ids[-1]):
        out.matched_token_id = whole.token_ids[-1]
    return out


def _output_logprobs(piece: Piece) -> vllm.OutputLogProbs | None:
    if not piece.logprobs:
        return None
    return vllm.OutputLogProbs(token_logprobs=[known.logprob for known in piece.logprobs], token_ids=piece.token_ids,
                               top_logprobs=[_top(known) for known in piece.logprobs])


def _input_logprobs(answer: Answer, known: Sequence[TokenLogprob]) -> vllm.InputLogProbs | None:
    """One for each token of the prompt; of the first nothing is known."""
    if not known:
        return None
    return vllm.InputLogProbs(
        token_logprobs=[vllm.InputTokenLogProb(), *(vllm.InputTokenLogProb(value=k.logprob) for k in known)],
        token_ids=answer.order.prompt, top_logprobs=[vllm.TopLogProbs(), *map(_top, known)])


def _top(known: TokenLogprob) -> vllm.TopLogProbs:
    return vllm.TopLogProbs(values=known.top_logprobs, token_ids=known.top_ids)

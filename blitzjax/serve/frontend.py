"""The service that clients call: streams answers, shows and scales the cluster.

Invariant: every Generate ends with a final message for each of its answers or a gRPC status that says what to change,
and whatever ends its stream (abort, deadline, a client that left; not a crash of the server, resume.py) also ends its
generation.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Iterable, Sequence

import grpc

from blitzjax.errors import BlitzError, InvalidRequest, Unavailable
from blitzjax.serve.answers import Answer, Piece
from blitzjax.serve.orders import order_of
from blitzjax.serve.rejoin import FINAL_KEY, RESUME_KEY
from blitzjax.types import LiveMode, Source, TokenLogprob
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.tokenizer import Tokenizer

SERVICE = "blitzjax.v1.Inference"
_FINAL = ((FINAL_KEY, "1"),)
_WATCH_GAP_S = 0.05  # between two pictures
_WATCH_PERIOD_S = 1.0  # a picture at least this often


class Frontend(rpc.InferenceServicer):
    """Holds no state of its own; the controller owns requests and cluster."""

    def __init__(self, controller: Controller):
        self._controller = controller

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        answers: tuple[Answer, ...] = ()
        try:
            if self._controller.draining:
                raise Unavailable("the server is shutting down; try another one")
            order = await order_of(request, self._controller.model, self._controller.context_tokens)
            answers = self._controller.submit(order, request.resume)
            if self._controller.resume_s:
                await context.send_initial_metadata(((RESUME_KEY, f"{self._controller.resume_s:g}"),))
            await _stream(answers, self._controller, context)
        except BlitzError as e:
            await _abort(context, e)
        finally:
            if answers:
                self._controller.leave(answers)

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        for request_id in request.request_ids:
            self._controller.abort(request_id)
        return pb.AbortResponse()

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.ClusterStatus:
        return picture(self._controller)

    async def Scale(self, request: pb.ScaleRequest, context: grpc.aio.ServicerContext) -> pb.ScaleResponse:
        try:
            return await self._scale(request)
        except BlitzError as e:
            await _abort(context, e)

    async def WatchScale(self, request: pb.WatchScaleRequest, context: grpc.aio.ServicerContext) -> None:
        sent, sent_at = pb.ClusterStatus(), -_WATCH_PERIOD_S
        while True:
            now = picture(self._controller)
            sent.at = now.at
            if now != sent or now.at - sent_at >= _WATCH_PERIOD_S:
                sent, sent_at = now, now.at
                await context.write(now)
            await asyncio.sleep(_WATCH_GAP_S)

    async def _scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse:
        controller, started = self._controller, self._controller.now()
        target, pool = request.target, controller.pool
        if controller.draining:
            raise Unavailable("the server is shutting down")
        if not 1 <= target <= pool:
            raise InvalidRequest(f"target must be in [1, {pool}]: the pool has {pool} workers; got {target}")
        joined = len(controller.status().instances)
        if target > joined:
            raise Unavailable(f"only {joined} of the pool's {pool} workers have joined so far; got target {target}")
        live = _choice("live", request.live, LiveMode) if request.HasField("live") else None
        source = _choice("source", request.source, Source) if request.HasField("source") else None
        with controller.subscribe() as changed:
            controller.scale(target, live, source)
            while request.wait and controller.serving != target:
                await changed.wait()
                changed.clear()
                if controller.status().target != target:
                    raise Superseded(f"the target became {controller.status().target} while waiting for {target}")
        return pb.ScaleResponse(serving=controller.serving, target=controller.status().target,
                                seconds=controller.now() - started)


class Superseded(BlitzError):
    """Somebody else changed the target."""

    code = "ABORTED"


async def _stream(answers: tuple[Answer, ...], controller: Controller, context: grpc.aio.ServicerContext) -> None:
    """Sends pieces as they come, joined when the client is slower than the tokens, until all answers of one order
    have ended. The first that fails ends the others.
    """
    changed, left = answers[0].changed, list(answers)
    while left:
        await changed.wait()
        changed.clear()
        for answer in list(left):
            piece, last = answer.take(), answer.ended
            if answer.failure is not None:
                which = f"answer {answer.index} of n={len(answers)}: " if len(answers) > 1 else ""
                await context.abort(grpc.StatusCode[answer.failure.code], which + answer.failure.message, _FINAL)
            if last or piece.token_ids:
                await context.write(_response(answer, piece, last, controller))
            if last:
                left.remove(answer)


def _response(answer: Answer, piece: Piece, last: bool, controller: Controller) -> pb.GenerateResponse:
    tokenizer = controller.model.tokenizer
    return pb.GenerateResponse(
        request_id=answer.order.request_id, index=answer.index, text=piece.text, token_ids=piece.token_ids,
        finish_reason=answer.finish_reason if last else "", usage=_usage(answer, controller) if last else None,
        logprobs=_scored(piece.token_ids, piece.logprobs, tokenizer), prompt_token_ids=piece.prompt_token_ids,
        prompt_logprobs=_scored(answer.order.prompt[1:], piece.prompt_logprobs, tokenizer))


def _scored(ids: Iterable[int], logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> list[pb.ScoredToken]:
    """Nothing when there are no logprobs; then one for each of `ids`."""
    if not logprobs:
        return []
    scored = list(zip(ids, logprobs, strict=True))
    seen = {token for token, _ in scored}.union(*(known.top_ids for known in logprobs))
    text = {token: tokenizer.decode((token,)) if tokenizer is not None else "" for token in seen}
    return [pb.ScoredToken(
        token_id=token, logprob=known.logprob, rank=known.rank, text=text[token],
        top=[pb.ScoredToken(token_id=other, logprob=logprob, rank=rank, text=text[other])
             for rank, (other, logprob) in enumerate(zip(known.top_ids, known.top_logprobs, strict=True), 1)])
        for token, known in scored]


def _usage(answer: Answer, controller: Controller) -> pb.Usage:
    arrival, now = answer.request.arrival_s, controller.now()
    assigned = now if answer.assigned_s is None else answer.assigned_s
    first = 0.0 if answer.first_token_s is None else answer.first_token_s - arrival
    return pb.Usage(prompt_tokens=answer.request.prompt_tokens, completion_tokens=len(answer.generated),
                    seed=answer.sampling.seed, queue_s=assigned - arrival, ttft_s=first,
                    layers_helped=answer.layers_helped, attempts=answer.attempts, cached_tokens=answer.cached_tokens)


def _choice(name: str, value: str, kind: object) -> typing.Any:
    allowed = typing.get_args(kind)
    if value not in allowed:
        raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


# --------------------------------------------------------------------------------------------------------------------
# The cluster's picture.


def picture(controller: Controller) -> pb.ClusterStatus:
    status, model, scale = controller.status(), controller.model, controller.config.scale
    return pb.ClusterStatus(
        at=controller.now(),
        models=[pb.ModelStatus(name=model.name, layers=model.spec.layers, max_model_len=controller.context_tokens,
                               bytes=model.bytes)],
        instances=[pb.InstanceStatus(
            id=i.id, phase=i.phase.value, layers_loaded=model.spec.layers_loaded(i.units), units_loaded=i.units,
            partner=i.partner or "", waiting=i.waiting, running=i.running, pages_used=i.pages_used,
            pages_total=i.pages_total, in_world=i.in_world, role=i.role.value, kv_received_bytes=i.kv_received_bytes)
            for i in status.instances],
        queued_requests=status.queued, running_requests=status.running, target_instances=status.target,
        live=scale.live, source=scale.source,
        chains=[pb.ChainStatus(ticket=ticket, instances=chain.instances) for ticket, chain in status.chains])


async def _abort(context: grpc.aio.ServicerContext, error: BlitzError) -> typing.NoReturn:
    await context.abort(grpc.StatusCode[error.code], str(error), _FINAL)

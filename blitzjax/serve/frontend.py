"""The service that clients call: streams answers, shows and scales the cluster.

Invariant: every Generate ends with a final message for each of its answers or a gRPC status that says what to change,
and whatever ends its stream (abort, deadline, a client that left; not a crash of the server, resume.py, nor a broken
connection of who has a key) also ends its generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import grpc

from blitzjax.errors import BlitzError, InvalidRequest, Unavailable, brief
from blitzjax.serve import deployments
from blitzjax.serve.answers import Answer, Piece
from blitzjax.serve.orders import order_of, prompt_of
from blitzjax.serve.rejoin import FINAL_KEY, RESUME_KEY
from blitzjax.types import LiveMode, Phase, Source, TokenLogprob
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.control.status import ModelStatus
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.model import ServedModel
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
        await self._promise(context)
        async with answering(lambda: request, self._controller, context) as (answers, model):
            await _stream(answers, model, self._controller, context, request.progress)

    async def _promise(self, context: grpc.aio.ServicerContext) -> None:
        """The client may call again if the connection breaks or this process crashes."""
        if self._controller.resume_s:
            await context.send_initial_metadata(((RESUME_KEY, f"{self._controller.resume_s:g}"),))

    async def Tokenize(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        await self._promise(context)
        try:
            model = self._controller.find(request.model)
            ids, text = await prompt_of(request, model, self._controller.context_tokens(model))
        except BlitzError as e:
            await abort(context, e)
        if request.HasField("tokens") and model.tokenizer is not None:
            text = model.tokenizer.decode(ids)
        return pb.TokenizeResponse(token_ids=ids, text=text, max_model_len=self._controller.context_tokens(model))

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        await self._promise(context)
        for request_id in request.request_ids:
            self._controller.abort(request_id)
        return pb.AbortResponse()

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.ClusterStatus:
        await self._promise(context)
        return picture(self._controller)

    async def Scale(self, request: pb.ScaleRequest, context: grpc.aio.ServicerContext) -> pb.ScaleResponse:
        await self._promise(context)
        try:
            return await self._scale(request)
        except BlitzError as e:
            await abort(context, e)

    async def Deploy(self, request: pb.DeployRequest, context: grpc.aio.ServicerContext) -> pb.DeployResponse:
        await self._promise(context)
        try:
            return await deployments.deploy(self._controller, request)
        except BlitzError as e:
            await abort(context, e)

    async def Undeploy(self, request: pb.UndeployRequest, context: grpc.aio.ServicerContext) -> pb.UndeployResponse:
        await self._promise(context)
        try:
            return await deployments.undeploy(self._controller, request.model, request.resume)
        except BlitzError as e:
            await abort(context, e)

    async def WatchScale(self, request: pb.WatchScaleRequest, context: grpc.aio.ServicerContext) -> None:
        await self._promise(context)
        sent, sent_at = pb.ClusterStatus(), -_WATCH_PERIOD_S
        while not self._controller.over:
            now = picture(self._controller)
            sent.at = now.at
            if now != sent or now.at - sent_at >= _WATCH_PERIOD_S:
                sent, sent_at = now, now.at
                await context.write(now)
            await asyncio.sleep(_WATCH_GAP_S)
        await abort(context, Unavailable("the server shut down"))

    async def _scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse:
        controller, started = self._controller, self._controller.now()
        target, pool = request.target, controller.pool
        if controller.draining:
            raise Unavailable("the server is shutting down")
        if not request.model and len(controller.models) > 1:
            raise InvalidRequest(f"say which model to scale: {', '.join(controller.models)}")
        name = controller.find(request.model).name

        def now() -> ModelStatus:
            found = next((m for m in controller.status().models if m.name == name), None)
            if found is None:
                raise Superseded(f"{name} was undeployed")
            return found

        least = min(1, now().least)
        if not least <= target <= pool:
            raise InvalidRequest(f"target must be in [{least}, {pool}]: the pool has {pool} workers; got {target}")
        joined = len(controller.status().instances)
        if target > joined:
            raise Unavailable(f"only {joined} of the pool's {pool} workers have joined so far; got target {target}")
        live = _choice("live", request.live, LiveMode) if request.HasField("live") else None
        source = _choice("source", request.source, Source) if request.HasField("source") else None
        with controller.subscribe() as changed:
            controller.scale(name, target, live, source)
            while request.wait and (now().serving != target or _coming(controller, name)):
                await changed.wait()
                changed.clear()
                controller.check_open()
                if now().target != target:
                    raise Superseded(f"the target became {now().target} while waiting for {target}")
        return pb.ScaleResponse(serving=now().serving, target=now().target, seconds=controller.now() - started)


def _coming(controller: Controller, model: str) -> bool:
    """An instance loads: it will serve before it can leave."""
    return any(i.model == model and i.phase in (Phase.LOADING, Phase.LIVE) for i in controller.status().instances)


class Superseded(BlitzError):
    """Somebody else changed the target, or took the model away."""

    code = "ABORTED"


@contextlib.asynccontextmanager
async def answering(asked: Callable[[], pb.GenerateRequest], controller: Controller,
                    context: grpc.aio.ServicerContext) -> AsyncIterator[tuple[tuple[Answer, ...], ServedModel]]:
    """Starts what is `asked` for, which may raise. → its answers, their model. They end with the block, and what fails in
    it ends the call; but who has a key and did not say a last word may come back for them.
    """
    answers: tuple[Answer, ...] = ()
    broken = False
    try:
        request = asked()
        model = controller.model_for(request.model, request.request_id, request.key)
        order = await order_of(request, model, controller.context_tokens(model), controller.page_size,
                               controller.config.serve.tool_call_parser)
        answers = controller.submit(order, request.resume, request.key)
        yield answers, model
    except BlitzError as e:
        await abort(context, e)
    except (asyncio.CancelledError, grpc.aio.InternalError):  # the second where it happens during a write
        broken = bool(request.key) and context.time_remaining() != 0  # at 0 it is the deadline
        raise
    finally:
        if answers:
            controller.leave(answers, broken)


async def _stream(answers: tuple[Answer, ...], model: ServedModel, controller: Controller,
                  context: grpc.aio.ServicerContext, progress: bool) -> None:
    """Until all answers of one order have ended. Before the first token, with `progress`, what they wait for."""
    if progress:
        await _tell_progress(answers[0].changed, answers[0].order.request_id, model, controller, context)
    async for answer, piece, last in pieces(answers, controller, context):
        if last or piece.token_ids:
            await context.write(_response(answer, piece, last, model.tokenizer, controller))


async def pieces(answers: tuple[Answer, ...], controller: Controller,
                 context: grpc.aio.ServicerContext) -> AsyncIterator[tuple[Answer, Piece, bool]]:
    """What answers of one order say, as it comes, joined when the client is slower than the tokens, and whether it was
    the last of that answer. The first that fails ends the call, and with it the others.
    """
    changed, left = answers[0].changed, list(answers)
    while left:
        await changed.wait()
        changed.clear()
        for answer in list(left):
            piece, last = answer.take(), answer.ended
            latencies = controller.latencies[answer.order.model]
            latencies.told(answer)
            if answer.failure is not None:
                which = f"answer {answer.index} of n={len(answers)}: " if len(answers) > 1 else ""
                await context.abort(grpc.StatusCode[answer.failure.code], brief(which + answer.failure.message), _FINAL)
            yield answer, piece, last
            if last:
                left.remove(answer)
                latencies.ended(answer, controller.now())


async def _tell_progress(changed: asyncio.Event, request_id: str, model: ServedModel, controller: Controller,
                         context: grpc.aio.ServicerContext) -> None:
    """Returns when there is something to send."""
    told = None
    while not changed.is_set():
        status = controller.status()
        state = next(m for m in status.models if m.name == model.name)
        units = max((i.units for i in status.instances if i.model == model.name), default=0)
        now = pb.Progress(serving=state.serving, layers_loaded=model.spec.layers_loaded(units),
                          layers=model.spec.layers, queued=state.queued)
        if now != told:
            told = now
            await context.write(pb.GenerateResponse(request_id=request_id, progress=now))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), _WATCH_GAP_S)


def _response(answer: Answer, piece: Piece, last: bool, tokenizer: Tokenizer | None,
              controller: Controller) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=answer.order.request_id, index=answer.index, text=piece.text, token_ids=piece.token_ids,
        finish_reason=answer.finish_reason if last else "", usage=_usage(answer, controller) if last else None,
        logprobs=_scored(piece.token_ids, piece.logprobs, tokenizer), prompt_token_ids=piece.prompt_token_ids,
        prompt_logprobs=_scored(answer.order.prompt[1:], piece.prompt_logprobs, tokenizer),
        tool_call_parser=answer.order.tool_call_parser, prompt_tokens=answer.request.prompt_tokens)


def _scored(ids: Iterable[int], logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> list[pb.ScoredToken]:
    """Nothing when there are no logprobs; then one for each of `ids`."""
    if not logprobs:
        return []
    scored = list(zip(ids, logprobs, strict=True))
    seen = {token for token, _ in scored}.union(*(known.top_ids for known in logprobs))
    alone = {token: ("", b"") if tokenizer is None else tokenizer.alone(token) for token in seen}
    special = () if tokenizer is None else tokenizer.special

    def one(token: int, logprob: float, rank: int, top: Iterable[pb.ScoredToken] = ()) -> pb.ScoredToken:
        text, raw = alone[token]
        return pb.ScoredToken(token_id=token, logprob=logprob, rank=rank, text=text, raw=raw, top=top,
                              special=token in special)

    return [one(token, known.logprob, known.rank, map(one, known.top_ids, known.top_logprobs, itertools.count(1)))
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
    status, models, scale = controller.status(), controller.models, controller.config.scale
    return pb.ClusterStatus(
        at=controller.now(),
        models=[_model_picture(m, models[m.name], controller) for m in status.models if m.name in models],
        instances=[pb.InstanceStatus(
            id=i.id, phase=i.phase.value, units_loaded=i.units,
            layers_loaded=models[i.model].spec.layers_loaded(i.units) if i.model in models else 0,
            partner=i.partner or "", waiting=i.waiting, running=i.running, pages_used=i.pages_used,
            pages_total=i.pages_total, in_world=i.in_world, role=i.role.value, kv_received_bytes=i.kv_received_bytes,
            model=i.model, copies=i.copies, **_prefix_counts(controller, "instance", i.id))
            for i in status.instances],
        queued_requests=status.queued, running_requests=status.running, target_instances=status.target,
        live=scale.live, source=scale.source,
        chains=[pb.ChainStatus(ticket=ticket, instances=chain.instances) for ticket, chain in status.chains])


def _model_picture(state: ModelStatus, model: ServedModel, controller: Controller) -> pb.ModelStatus:
    return pb.ModelStatus(
        name=model.name, layers=model.spec.layers, max_model_len=controller.context_tokens(model), bytes=model.bytes,
        serving=state.serving, target=state.target, queued=state.queued, running=state.running,
        host_copy=state.copy or state.coming or "", copying=state.coming is not None, closing=state.closing,
        **_prefix_counts(controller, "model", model.name))


def _prefix_counts(controller: Controller, kind: str, name: str) -> dict[str, int]:
    counts, key = controller.replica.prefixes, (kind, name)
    return {"prefix_cache_queries": counts.queries[key], "prefix_cache_hits": counts.hits[key]}


async def abort(context: grpc.aio.ServicerContext, error: BlitzError) -> typing.NoReturn:
    await context.abort(grpc.StatusCode[error.code], brief(str(error)), _FINAL)
    raise AssertionError  # abort has raised

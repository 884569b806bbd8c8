"""The service that clients call: streams answers, shows and scales the cluster.

Invariant: every Generate ends with a final message for each of its answers or a gRPC status that says what to change,
and whatever ends its stream (abort, deadline, a client that left; not a crash of the server, resume.py, nor a broken
connection of who has a key) also ends its generation.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import AsyncIterator

import grpc

from blitzjax.errors import BlitzError, InvalidRequest, Unavailable
from blitzjax.serve import deployments
from blitzjax.serve.orders import prompt_of
from blitzjax.serve.rejoin import RESUME_KEY
from blitzjax.serve.relay import Relay
from blitzjax.serve.streams import abort, answering, pieces, response, tell_progress
from blitzjax.types import LiveMode, Phase, Source
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.control.status import ModelStatus
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.model import ServedModel

SERVICE = "blitzjax.v1.Inference"
_WATCH_GAP_S = 0.05  # between two pictures
_WATCH_PERIOD_S = 1.0  # a picture at least this often
_OR_POLICY = ", or the automatic policy did, scale.down_after_s after the last change; with scale.policy=manual it does not"


class Frontend(rpc.InferenceServicer):
    """Holds no state of its own; the controller owns requests and cluster."""

    def __init__(self, controller: Controller):
        self._controller = controller

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        await self._promise(context)
        async with answering(lambda: request, self._controller, context) as (answers, model):
            if request.progress:
                await tell_progress(answers[0], model, self._controller, context.write)
            async for answer, piece, last in pieces(answers, self._controller):
                if last or piece.token_ids or piece.prompt_token_ids:
                    await context.write(response(answer, piece, last, model.tokenizer, self._controller))

    async def Relay(self, requests: AsyncIterator[pb.RelayRequest], context: grpc.aio.ServicerContext) -> None:
        await self._promise(context)
        try:
            await Relay(self._controller, context.write).run(requests)
        except BlitzError as e:
            await abort(context, e)

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
            text = model.tokenizer.decode(ids, shown=model.tokenizer.special)
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
        target = request.target
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

        _check_target(controller, now(), target, request.wait)
        live = _choice("live", request.live, LiveMode) if request.HasField("live") else None
        source = _choice("source", request.source, Source) if request.HasField("source") else None
        with controller.subscribe() as changed:
            controller.scale(name, target, live, source)
            while request.wait and (now().serving != target or _coming(controller, name)):
                await changed.wait()
                changed.clear()
                controller.check_open()
                if now().target != target:
                    raise Superseded(f"the target became {now().target} while waiting for {target}: somebody else changed it"
                                     f"{_OR_POLICY if controller.config.scale.policy == 'auto' else ''}")
        return pb.ScaleResponse(serving=now().serving, target=now().target, seconds=controller.now() - started)


def _check_target(controller: Controller, model: ModelStatus, target: int, wait: bool) -> None:
    """Raises InvalidRequest for what this pool never has, Unavailable for what it has not now. Who does not `wait` may
    want more than other models leave, and has what they leave.
    """
    pool, split = controller.pool, controller.config.scale.roles == "split"
    others = {m.name: m.least + split * controller.config.scale.min_decode for m in controller.status().models
              if m.name != model.name}
    least, most = (1 + split if model.least else 0), pool - wait * sum(others.values())
    if not least <= target <= most:
        promised = f", {pool - most} of them promised to {', '.join(n for n, k in others.items() if k)}" * (most < pool)
        minimum = ""
        if target < least:
            minimum = ", split roles need 2" if split else ", and min_instances is above 0"
        raise InvalidRequest(f"target must be in [{least}, {most}]: the pool has {pool} workers{promised}{minimum}; "
                             f"got {target}")
    joined = len(controller.status().instances)
    if target > joined:
        raise Unavailable(f"only {joined} of the pool's {pool} workers have joined so far, not "
                          f"{', '.join(controller.awaited)}; got target {target}")


def _coming(controller: Controller, model: str) -> bool:
    """An instance loads: it will serve before it can leave."""
    return any(i.model == model and i.phase in (Phase.LOADING, Phase.LIVE) for i in controller.status().instances)


class Superseded(BlitzError):
    """Somebody else changed the target, or took the model away."""

    code = "ABORTED"


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
        live=scale.live, source=scale.source, dtype=controller.config.engine.dtype, awaited=controller.awaited,
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

"""The service that clients call: checks requests at the edge, streams answers, shows and scales the cluster.

Invariant: every Generate ends with a final message or a gRPC status that says what to change, and whatever ends its
stream (abort, deadline, a client that left) also ends its generation.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import typing
import uuid

import grpc

from blitzjax.errors import BlitzError, InvalidRequest, Unavailable, UnknownModel
from blitzjax.serve.answers import Answer, Order
from blitzjax.types import LiveMode, Sampling, Source
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.model import ServedModel

SERVICE = "blitzjax.v1.Inference"
DEFAULT_MAX_TOKENS = 128  # shrinks to what fits behind the prompt
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_ID_CHARS = 256
ROLES = ("system", "user", "assistant")
_LONG_TEXT_CHARS = 4096  # longer texts are tokenized outside the event loop
_WATCH_GAP_S = 0.05  # between two pictures
_WATCH_PERIOD_S = 1.0  # a picture at least this often


class Frontend(rpc.InferenceServicer):
    """Holds no state of its own; the controller owns requests and cluster."""

    def __init__(self, controller: Controller):
        self._controller = controller

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        answer = None
        try:
            if self._controller.draining:
                raise Unavailable("the server is shutting down; try another one")
            answer = self._controller.submit(await _order(request, self._controller))
            await _stream(answer, self._controller, context)
        except BlitzError as e:
            await _abort(context, e)
        finally:
            if answer is not None:
                self._controller.leave(answer)

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


async def _stream(answer: Answer, controller: Controller, context: grpc.aio.ServicerContext) -> None:
    """Sends pieces as they come, joined when the client is slower than the tokens, until the answer ends."""
    while True:
        await answer.changed.wait()
        piece = answer.take()
        if answer.failure is not None:
            await context.abort(grpc.StatusCode[answer.failure.code], answer.failure.message)
        last = answer.ended
        if last or piece.text or piece.token_ids:
            await context.write(pb.GenerateResponse(
                request_id=answer.order.request_id, text=piece.text, token_ids=piece.token_ids,
                finish_reason=answer.finish_reason if last else "", usage=_usage(answer, controller) if last else None))
        if last:
            return


def _usage(answer: Answer, controller: Controller) -> pb.Usage:
    arrival, now = answer.request.arrival_s, controller.now()
    assigned = now if answer.assigned_s is None else answer.assigned_s
    first = 0.0 if answer.first_token_s is None else answer.first_token_s - arrival
    return pb.Usage(prompt_tokens=answer.request.prompt_tokens, completion_tokens=len(answer.generated),
                    seed=answer.order.sampling.seed, queue_s=assigned - arrival, ttft_s=first,
                    layers_helped=answer.layers_helped, attempts=answer.attempts)


# --------------------------------------------------------------------------------------------------------------------
# Checks. Every message names the limit that was passed.


async def _order(request: pb.GenerateRequest, controller: Controller) -> Order:
    """Raises InvalidRequest or UnknownModel."""
    model = controller.model
    if request.model not in ("", model.name):
        raise UnknownModel(f"no model {request.model!r} here; served: {model.name}")
    if len(request.request_id) > MAX_ID_CHARS:
        raise InvalidRequest(f"request_id may have {MAX_ID_CHARS} characters, got {len(request.request_id)}")
    sampling = request.sampling
    _check_sampling(sampling, model.spec.vocab)
    if sampling.stop and model.tokenizer is None:
        raise InvalidRequest("this model has no tokenizer, so stop strings cannot be found; use stop_token_ids")
    prompt = await _prompt(request, model)
    return Order(
        request_id=request.request_id or uuid.uuid4().hex, model=model.name, prompt=prompt,
        sampling=_sampling(sampling, len(prompt), controller.context_tokens), stop=tuple(sampling.stop),
        priority=request.priority)


async def _prompt(request: pb.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    match request.WhichOneof("input"):
        case "tokens":
            ids = tuple(request.tokens.ids)
            wrong = next((t for t in ids if not 0 <= t < model.spec.vocab), None)
            if wrong is not None:
                raise InvalidRequest(f"token id {wrong} is outside the vocabulary [0, {model.spec.vocab})")
        case "text" | "chat" if model.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; send tokens instead of text or chat")
        case "text":
            ids = await _encode(model.tokenizer.encode, request.text) if request.text else ()
        case "chat":
            ids = await _encode(model.tokenizer.encode_rendered, _render(request.chat, model))
        case _:
            raise InvalidRequest("no input: set text, tokens or chat")
    if not ids:
        raise InvalidRequest("the prompt is empty; it needs at least 1 token")
    return ids


def _render(chat: pb.Chat, model: ServedModel) -> str:
    if not chat.messages:
        raise InvalidRequest("the chat is empty; it needs at least 1 message")
    for message in chat.messages:
        if message.role not in ROLES:
            raise InvalidRequest(f"unknown chat role {message.role!r}; roles are {', '.join(ROLES)}")
    return model.tokenizer.chat([{"role": m.role, "content": m.content} for m in chat.messages])


async def _encode(encode: typing.Callable[[str], tuple[int, ...]], text: str) -> tuple[int, ...]:
    return encode(text) if len(text) < _LONG_TEXT_CHARS else await asyncio.to_thread(encode, text)


def _check_sampling(s: pb.SamplingParams, vocab: int) -> None:
    def want(ok: bool, message: str) -> None:
        if not ok:
            raise InvalidRequest(message)

    want(math.isfinite(s.temperature) and 0 <= s.temperature <= MAX_TEMPERATURE,
         f"temperature must be in [0, {MAX_TEMPERATURE:g}], got {s.temperature:g}")
    want(not s.HasField("top_p") or 0 < s.top_p <= 1, f"top_p must be in (0, 1], got {s.top_p:g}")
    want(s.top_k >= 0, f"top_k must be at least 0 (0: off), got {s.top_k}")
    want(s.seed >= 0, f"seed must be in [0, 2^63), got {s.seed}")
    want(not s.HasField("max_tokens") or s.max_tokens >= 1, f"max_tokens must be at least 1, got {s.max_tokens}")
    want(len(s.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} stop strings, got {len(s.stop)}")
    want(all(s.stop), "a stop string is empty; each needs at least 1 character")
    longest = max(map(len, s.stop), default=0)
    want(longest <= MAX_STOP_CHARS, f"a stop string may have {MAX_STOP_CHARS} characters, got {longest}")
    want(len(s.stop_token_ids) <= MAX_STOP_TOKENS,
         f"at most {MAX_STOP_TOKENS} stop_token_ids, got {len(s.stop_token_ids)}")
    for token in s.stop_token_ids:
        want(0 <= token < vocab, f"stop token id {token} is outside the vocabulary [0, {vocab})")


def _sampling(s: pb.SamplingParams, prompt_tokens: int, context_tokens: int) -> Sampling:
    """Fills defaults; draws a seed when there is none. Raises InvalidRequest when the answer does not fit."""
    room = context_tokens - prompt_tokens
    wanted = s.max_tokens if s.HasField("max_tokens") else max(1, min(DEFAULT_MAX_TOKENS, room))
    if wanted > room:
        raise InvalidRequest(f"prompt ({prompt_tokens} tokens) + max_tokens ({wanted}) = {prompt_tokens + wanted} "
                             f"exceeds the context of {context_tokens} tokens")
    return Sampling(max_tokens=wanted, temperature=s.temperature, top_k=s.top_k,
                    top_p=s.top_p if s.HasField("top_p") else 1.0,
                    seed=s.seed if s.HasField("seed") else secrets.randbits(31),
                    stop_token_ids=tuple(s.stop_token_ids), ignore_eos=s.ignore_eos)


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
            pages_total=i.pages_total, in_world=i.in_world) for i in status.instances],
        queued_requests=status.queued, running_requests=status.running, target_instances=status.target,
        live=scale.live, source=scale.source,
        chains=[pb.ChainStatus(ticket=ticket, instances=chain.instances) for ticket, chain in status.chains])


async def _abort(context: grpc.aio.ServicerContext, error: BlitzError) -> typing.NoReturn:
    await context.abort(grpc.StatusCode[error.code], str(error))

"""An order's answers on their way to a caller: from a request to what is streamed of it.

Invariant: a stream says all of each of its answers, in order, then that it ended, or why.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence

import grpc

from blitzjax.errors import BlitzError, brief
from blitzjax.serve.answers import Answer, Piece
from blitzjax.serve.orders import order_of
from blitzjax.serve.rejoin import FINAL_KEY
from blitzjax.types import TokenLogprob
from blitzjax.v1 import inference_pb2 as pb

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.model import ServedModel
    from blitzjax.serve.tokenizer import Tokenizer

_FINAL = ((FINAL_KEY, "1"),)
_LOOK_S = 0.05  # from one look at what requests wait for to the next


async def begin(request: pb.GenerateRequest, controller: Controller) -> tuple[tuple[Answer, ...], ServedModel]:
    """Starts what is asked for. → its answers, their model. Raises what order_of and Controller.submit raise."""
    model = controller.model_for(request.model, request.request_id, request.key)
    order = await order_of(request, model, controller.context_tokens(model), controller.page_size,
                           controller.config.serve.tool_call_parser)
    return controller.submit(order, request.resume, request.key), model


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
        answers, model = await begin(request, controller)
        yield answers, model
    except BlitzError as e:
        await abort(context, e)
    except (asyncio.CancelledError, grpc.aio.InternalError):  # the second where it happens during a write
        broken = bool(request.key) and context.time_remaining() != 0  # at 0 it is the deadline
        raise
    finally:
        if answers:
            controller.leave(answers, broken)


async def pieces(answers: tuple[Answer, ...], controller: Controller) -> AsyncIterator[tuple[Answer, Piece, bool]]:
    """What answers of one order say, as it comes, joined when the caller is slower than the tokens, and whether it was
    the last of that answer. Raises the failure of the first that fails.
    """
    changed, left = answers[0].changed, list(answers)
    while left:
        await changed.wait()
        changed.clear()
        for said in taken(answers, left, controller):
            yield said


def taken(answers: Sequence[Answer], left: list[Answer], controller: Controller) -> Iterator[tuple[Answer, Piece, bool]]:
    """What those `left` of one order's answers have to say now, see `pieces`; those that have ended leave the list."""
    latencies = controller.latencies[answers[0].order.model]
    for answer in list(left):
        piece, last = answer.take(), answer.ended
        latencies.told(answer)
        if answer.failure is not None:
            which = f"answer {answer.index} of n={len(answers)}: " if len(answers) > 1 else ""
            failure = BlitzError(which + answer.failure.message)
            failure.code = answer.failure.code
            raise failure
        if piece.echo is not None:
            yield answer, piece.echo, False
        yield answer, piece, last
        if last:
            left.remove(answer)
            latencies.ended(answer, controller.now())


async def tell_progress(answer: Answer, model: ServedModel, controller: Controller,
                        write: Callable[[pb.GenerateResponse], Awaitable[None]]) -> None:
    """What its order waits for. Returns when there is something to send."""
    told = None
    while not answer.changed.is_set():
        status = controller.status()
        state = next(m for m in status.models if m.name == model.name)
        units = max((i.units for i in status.instances if i.model == model.name), default=0)
        now = pb.Progress(serving=state.serving, layers_loaded=model.spec.layers_loaded(units),
                          layers=model.spec.layers, queued=state.queued)
        if now != told:
            told = now
            await write(pb.GenerateResponse(request_id=answer.order.request_id, progress=now))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(answer.changed.wait(), _LOOK_S)


def response(answer: Answer, piece: Piece, last: bool, tokenizer: Tokenizer | None,
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


async def abort(context: grpc.aio.ServicerContext, error: BlitzError) -> typing.NoReturn:
    await context.abort(grpc.StatusCode[error.code], brief(str(error)), _FINAL)
    raise AssertionError  # abort has raised

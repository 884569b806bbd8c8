"""A worker whose answers can be computed by hand: the next token is (last token + 1) % vocabulary.

`python toy_worker.py --listen HOST:PORT ...` speaks the Worker protocol over a real socket and imports no jax.
With the byte tokenizer of toy.py, "a" continues "bcde...". Sampling is misused as a remote control:
temperature is the pause before each token in seconds. A token's logprob is minus its id. TOY_REFUSE makes it refuse with
that message; TOY_DIE_AFTER kills it when an answer ends with that token, before it reports RequestFinished. While the file
TOY_GATE is there, no answer gets beyond the first token that this worker adds, and no load begins.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import uuid

import grpc

from blitzjax import commands, events, types
from blitzjax.serve import codec
from blitzjax.serve.channels import WORKER_SERVER
from blitzjax.serve.sessions import Session
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

UNIT_S = 0.002  # a unit's arrival


class Outbox:
    """Of one connection; see sessions.Outbox."""

    def __init__(self):
        self._queue = asyncio.Queue()
        self.put = self._queue.put_nowait

    async def send(self, context):
        while True:
            await context.write(await self._queue.get())


class ToyWorker(rpc.WorkerServicer):
    """One session at a time; everything is forgotten when it ends."""

    def __init__(self):
        self.incarnation = uuid.uuid4().hex
        self.session = Session()
        self.toy: Toy | None = None

    async def Run(self, requests, context):
        configure, outbox = (await anext(requests)).configure, Outbox()
        if message := os.environ.get("TOY_REFUSE"):
            await context.write(pb.WorkerEvent(refused=pb.Refused(instance=configure.instance, message=message)))
            return

        def renew():
            self.forget()
            self.toy = Toy(configure, self.session)
            return codec.encode_event(self.toy.joined(self.incarnation))

        if self.session.connect(configure, outbox, renew):
            self.toy.emit(events.WorldJoined(0.0, self.toy.instance))
        sender = asyncio.create_task(outbox.send(context))
        try:
            async for message in requests:
                self.session.take(outbox, message, lambda: self.toy.told(message))
        finally:
            sender.cancel()
            if (connection := self.session.disconnect(outbox)) is not None:
                wait = self.toy.resume_timeout_s if self.session.resumable else 0
                asyncio.get_running_loop().call_later(wait, lambda: self.session.end(connection, self.forget))

    @property
    def busy(self):
        return self.toy is not None and any(not task.done() for task in self.toy.tasks.values())

    def die(self):
        """What comes next is another process."""
        self.forget()
        self.incarnation, self.session = uuid.uuid4().hex, Session()

    def forget(self):
        for task in self.toy.tasks.values() if self.toy else ():
            task.cancel()


class Toy:
    """What one session has made of the worker."""

    def __init__(self, configure: pb.Configure, session: Session):
        self.instance, self.session = configure.instance, session
        config = json.loads(configure.config_json)
        self.config, self.resume_timeout_s = config["engine"], config["serve"]["resume_timeout_s"]
        self.specs: dict[str, types.ModelSpec] = {}
        for model in configure.models:
            self.deploy(model)
        self.model, self.units = "", 0  # that it is an instance of
        self.copies: dict[str, int] = {}  # models kept in host memory, units
        self.plans: dict[int, types.MulticastPlan] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.step = pb.Decoded()

    def deploy(self, model: pb.Model) -> None:
        spec = codec.model_spec(model.model_json)
        self.specs[spec.name] = spec

    def joined(self, incarnation: str) -> events.InstanceJoined:
        slots, length, size = (self.config[k] for k in ("max_num_seqs", "max_model_len", "page_size"))
        return events.InstanceJoined(0.0, self.instance, incarnation, "localhost", 0, slots * length // size, size,
                                     slots)

    def emit(self, event: events.Event) -> None:
        self.session.put(codec.encode_event(event))

    def told(self, message: pb.WorkerCommand) -> None:
        match message.WhichOneof("command"):
            case "deploy":
                self.deploy(message.deploy)
                self.emit(events.ModelReady(0.0, self.instance, codec.model_spec(message.deploy.model_json).name))
            case "undeploy":
                del self.specs[message.undeploy.model]
            case _:
                self.obey(codec.decode_command(message, self.instance))

    def obey(self, command: commands.Command | types.Work) -> None:
        me = self.instance
        match command:
            case types.Work():
                self.tasks[command.request.id] = asyncio.create_task(self.answer(command))
            case commands.Abort():
                if task := self.tasks.pop(command.request_id, None):
                    task.cancel()
                    self.emit(events.RequestFinished(0.0, me, command.request_id, task.attempt, "abort"))
            case commands.LoadFromDisk():
                self.become(command.model)
                self.spawn(self.load(command.ticket, command.model))
            case commands.KeepCopy():
                self.copies.setdefault(command.model, 0)
                self.spawn(self.load(command.ticket, command.model))
            case commands.UseCopy():
                units = self.copies.pop(command.model)
                self.become(command.model)
                self.units = units
                self.emit(events.TransferEnded(0.0, me, command.ticket, units, ""))
            case commands.DropCopy():
                self.copies.pop(command.model, None)
            case commands.PrepareTransfer(plan=plan):
                self.plans[plan.ticket] = plan
                if me != next(c for c in plan.chains if me in c.instances).instances[0]:
                    self.copies.setdefault(plan.model, 0) if plan.copy else self.become(plan.model)
                self.emit(events.TransferReady(0.0, me, plan.ticket))
            case commands.StartTransfer():
                self.spawn(self.load(command.ticket, self.plans[command.ticket].model))
            case commands.CancelTransfer():
                units = self.holds(self.plans[command.ticket].model)
                self.emit(events.TransferEnded(0.0, me, command.ticket, units, "cancelled"))
            case commands.Release():
                if command.keep:
                    self.copies[self.model] = self.units
                self.model, self.units = "", 0
                self.emit(events.Drained(0.0, me))

    def spawn(self, work) -> None:
        self.tasks[uuid.uuid4().hex] = asyncio.create_task(work)

    def become(self, model: str) -> None:
        if self.model != model:
            assert not self.units
            self.model = model

    def holds(self, model: str) -> int:
        return self.units if self.model == model else self.copies.get(model, 0)

    async def load(self, ticket: int, model: str) -> None:
        """Every unit that is missing, of the instance or of the copy."""
        await opened()
        while self.holds(model) < self.specs[model].units:
            await asyncio.sleep(UNIT_S)
            if self.model != model:
                self.copies[model] += 1
                continue
            self.units += 1
            self.emit(events.LayerLoaded(0.0, self.instance, self.units))
        self.emit(events.TransferEnded(0.0, self.instance, ticket, self.holds(model), ""))

    async def answer(self, work: types.Work) -> None:
        asyncio.current_task().attempt = work.attempt
        at = (0.0, self.instance, work.request.id, work.attempt)
        assert work.request.model == self.model
        last, sampling, spec = (*work.prompt, *work.generated)[-1], work.sampling, self.specs[self.model]
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(spec.eos_token_ids))
        for index in range(len(work.generated), sampling.max_tokens):
            await asyncio.sleep(sampling.temperature)
            first = index == len(work.generated)
            if not first:
                await opened()
            last = (last + 1) % spec.vocab
            reason = "stop" if last in stops else "length" if index == sampling.max_tokens - 1 else ""
            if first or reason or sampling.logprobs >= 0:
                self.session.put(pb.WorkerEvent(tokens=pb.Tokens(
                    request_id=work.request.id, attempt=work.attempt, start=index, token_ids=[last],
                    finish_reason=reason, logprobs=logprobs([last], sampling.logprobs),
                    prompt_logprobs=logprobs(work.prompt[1:], sampling.prompt_logprobs) if index == 0 else ())))
            else:
                self.decoded(work, index, last)
            if first:
                self.emit(events.PrefillDone(*at))
            if reason:
                if os.environ.get("TOY_DIE_AFTER") == str(last):
                    while self.session._kept:  # what was said has not been heard
                        await asyncio.sleep(0.01)
                    os._exit(1)
                break
        self.tasks.pop(work.request.id, None)
        self.emit(events.RequestFinished(*at, reason))

    def decoded(self, work: types.Work, index: int, token: int) -> None:
        """Tokens that come in one moment share a message."""
        if not self.step.token_ids:
            asyncio.get_running_loop().call_soon(self.step_done)
        self.step.request_ids.append(work.request.id)
        self.step.attempts.append(work.attempt)
        self.step.starts.append(index)
        self.step.token_ids.append(token)

    def step_done(self) -> None:
        self.session.put(pb.WorkerEvent(decoded=self.step))
        self.step = pb.Decoded()


async def opened() -> None:
    while (gate := os.environ.get("TOY_GATE")) and os.path.exists(gate):
        await asyncio.sleep(0.01)


def logprobs(tokens, top: int) -> list[pb.TokenLogprob]:
    """Each token, then those that follow it, as the likeliest."""
    return [] if top < 0 else [pb.TokenLogprob(logprob=-t, rank=1, top_ids=range(t, t + top),
                                               top_logprobs=range(-t, -t - top, -1)) for t in tokens]


async def serve(address: str) -> None:
    server = grpc.aio.server(options=WORKER_SERVER)
    rpc.add_WorkerServicer_to_server(ToyWorker(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    for flag in ("--rank", "--world", "--coordinator"):
        parser.add_argument(flag)
    asyncio.run(serve(parser.parse_args().listen))

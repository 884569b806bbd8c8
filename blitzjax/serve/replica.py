"""The controller's state: brain, answers, and what was sent to whom. What follows from an order, an event, or tokens?

Invariant: everything here follows from the arguments of `admit`, `react`, `told` and the other calls, in their order,
and nothing here waits, reads a clock, or tells anybody: a journal of the calls makes the same state in another process.
What the brain must hear next is returned, first thing first.
"""

from __future__ import annotations

import logging
import pickle
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blitzjax import commands, events, types
from blitzjax.config import Config
from blitzjax.control.cluster import Cluster
from blitzjax.serve import codec
from blitzjax.serve.accepted import Accepted
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.eventlog import EventLog
from blitzjax.serve.links import WorkerLink
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.v1 import worker_pb2 as pb

_log = logging.getLogger("blitzjax.controller")


@dataclass(slots=True)
class PrefixCounts:
    """Prompt tokens that prefix caches were asked for and had, by model and by instance."""

    queries: Counter[tuple[str, str]] = field(default_factory=Counter)
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, model: str, instance: types.InstanceId, asked: int, had: int) -> None:
        for key in (("model", model), ("instance", instance)):
            self.queries[key] += asked
            self.hits[key] += had


class Replica:
    """Owned by the controller; the links, which it shares with it, queue what they are given."""

    def __init__(self, config: Config, models: Sequence[ServedModel], links: Mapping[types.InstanceId, WorkerLink]):
        """The links configure their workers for `models`."""
        self.links = links
        self.models = {model.name: model for model in models}
        self.orders = Accepted(self.models, config.serve.resume_timeout_s)
        self.cluster = Cluster(config, [model.spec for model in models])
        self.event_log: EventLog | None = None
        self.prefixes = PrefixCounts()
        self._caches = config.engine.prefix_caching
        # Answers whose last token came before their RequestFinished: instance and event, in case the worker dies.
        self._unconfirmed: dict[types.RequestId, events.RequestFinished] = {}

    def unconfirmed(self, instance: types.InstanceId) -> list[events.RequestFinished]:
        return [event for event in self._unconfirmed.values() if event.instance == instance]

    def deploy(self, model: ServedModel, least: int | None, most: int | None, at: float) -> list[events.Event]:
        self.models[model.name] = model
        for link in self.links.values():
            link.configure.models.append(message_of(model))
            link.send(pb.WorkerCommand(deploy=message_of(model)))
        return [events.ModelDeployed(at, model.spec, least, most)]

    def remove(self, name: str) -> None:
        """The brain has forgotten the model."""
        message = message_of(self.models.pop(name))
        for link in self.links.values():
            link.configure.models.remove(message)
            link.send(pb.WorkerCommand(undeploy=pb.Undeploy(model=name)))

    def admit(self, order: Order, first: int, at: float) -> list[events.Event]:
        return [events.RequestArrived(at, answer.request) for answer in self.orders.admit(order, first, at)]

    def told(self, instance: types.InstanceId, said: pb.Tokens | pb.Decoded, at: float) -> list[events.Event]:
        if isinstance(said, pb.Tokens):
            return self._told_tokens(instance, said, at)
        due: list[events.Event] = []
        columns = said.request_ids, said.attempts, said.starts, said.token_ids
        for request_id, attempt, start, token in zip(*columns, strict=True):
            answer = self._awaited(request_id, attempt)
            if answer is not None:
                due += self._push(instance, answer, at, start, [token])
        return due

    def _told_tokens(self, instance: types.InstanceId, tokens: pb.Tokens, at: float) -> list[events.Event]:
        answer = self._awaited(tokens.request_id, tokens.attempt)
        if answer is None:
            return []
        if self._caches and tokens.start == 0 and not answer.generated and answer.sampling.prompt_logprobs < 0:
            self.prefixes.add(answer.order.model, instance, answer.request.prompt_tokens, tokens.cached_tokens)
        answer.layers_helped = max(answer.layers_helped, tokens.layers_helped)
        answer.cached_tokens = tokens.cached_tokens if tokens.start == 0 else answer.cached_tokens
        return self._push(instance, answer, at, tokens.start, list(tokens.token_ids),
                          typing.cast("types.FinishReason | None", tokens.finish_reason or None),
                          codec.decode_logprobs(tokens.logprobs), codec.decode_logprobs(tokens.prompt_logprobs))

    def _awaited(self, request_id: types.RequestId, attempt: int) -> Answer | None:
        """None: the client left, or a later attempt runs elsewhere."""
        answer = self.orders.get(request_id)
        return answer if answer is not None and answer.attempt == attempt else None

    def _push(self, instance: types.InstanceId, answer: Answer, at: float, start: int, token_ids: list[int],
              reason: types.FinishReason | None = None, *logprobs: list[types.TokenLogprob]) -> list[events.Event]:
        try:
            answer.push(start, token_ids, reason, at, *logprobs)
        except IndexError as e:
            _log.error("%s: %s", instance, e)
            answer.fail("INTERNAL", str(e))
        if not answer.ended:
            return []
        self.orders.over(answer)
        if reason is not None and answer.failure is None:
            self._unconfirmed[answer.request.id] = events.RequestFinished(
                at, instance, answer.request.id, answer.attempt, reason)
            return []
        return [events.RequestCancelled(at, answer.request.id)]  # a stop string, or broken

    def react(self, event: events.Event) -> list[events.Event]:
        due: list[events.Event] = []
        for command in self.cluster.handle(event):
            if self.event_log is not None:
                self.event_log.command(event.at, command)
            due += self._execute(command, event.at)
        if isinstance(event, events.RequestFinished):
            self._confirm(event)
        elif isinstance(event, events.RequestCancelled):
            answer = self.orders.get(event.request_id)
            if answer is not None:
                self.orders.over(answer)
                answer.end("abort")
        return due

    def _confirm(self, event: events.RequestFinished) -> None:
        """Ends an answer whose last tokens did not say so; every request ends with a reply."""
        self._unconfirmed.pop(event.request_id, None)
        answer = self.orders.get(event.request_id)
        if answer is None or event.attempt != answer.attempt or event.reason == "abort":
            return  # an aborted attempt runs again, unless the client left: then nobody waits
        self.orders.over(answer)
        if event.reason == "error":
            answer.fail("INTERNAL", f"{event.instance} could not finish the request")
        else:
            answer.end(event.reason)

    def _execute(self, command: commands.Command, at: float) -> list[events.Event]:
        if isinstance(command, commands.Reject):
            answer = self.orders.get(command.request_id)
            if answer is not None:
                self.orders.over(answer)
                answer.fail(command.code, command.message)
            return []
        work = None
        if isinstance(command, commands.Assign):
            answer = self.orders.get(command.request_id)
            if answer is None:  # its client has everything already
                return [events.RequestFinished(at, command.instance, command.request_id, command.attempt, "stop")]
            work = answer.work(command.attempt, at)
        self.links[command.instance].send(codec.encode_command(command, work))
        return []

    # ---- in another process

    def replay(self, event: events.Event) -> list[events.Event]:
        """`react`, and what the link had noticed when it reported the event."""
        if isinstance(event, events.InstanceJoined):
            self.links[event.instance].begin()
        elif isinstance(event, events.InstanceLost):
            self.links[event.instance].joined = False
        return self.react(event)

    def snapshot(self) -> bytes:
        """Raises what pickle raises, if a part of the brain cannot be pickled."""
        links = {link.instance: link.state() for link in self.links.values()}
        models = [(model.directory, model.name) for model in self.models.values()]
        return pickle.dumps((self.cluster, models, self.orders.past(), self._unconfirmed, self.prefixes, links))

    def restore(self, snapshot: bytes) -> None:
        """Into a new replica. Raises CheckpointError when a model is not there any more."""
        self.cluster, known, past, self._unconfirmed, self.prefixes, links = pickle.loads(snapshot)
        models = [load_model(directory, name) for directory, name in known]
        self.models.clear()
        self.models |= {model.name: model for model in models}
        self.orders.restore(*past)
        for instance, link in links.items():
            self.links[instance].restore(link)
            del self.links[instance].configure.models[:]
            self.links[instance].configure.models.extend(map(message_of, models))


def message_of(model: ServedModel) -> pb.Model:
    return pb.Model(model_json=model.manifest_json, checkpoint=str(model.directory))

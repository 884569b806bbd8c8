"""How fast is this machine? Costs of a model, measured on a running cluster: what `blitzjax sim --costs` reads.

Everything is read from the controller's event log, so that a simulated brain hears what a live one does: overheads of
sockets and processes are in the figures. Two instances compute at once, and parameters move while both do, as in every
scale-up: what they share on this machine, be it cores, counts. Invariant: nothing else is asked meanwhile.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from blitzjax.config import Config
from blitzjax.errors import BlitzError
from blitzjax.serve import eventlog
from blitzjax.serve.client import Client
from blitzjax.serve.eventlog import Record
from blitzjax.serve.model import ServedModel
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.commands import LoadFromDisk, PrepareTransfer, StartTransfer
from blitzjax.events import (
    InstanceJoined, LayerLoaded, PrefillDone, RequestArrived, RequestFinished, RequestHanded, TransferEnded,
)
from blitzjax.types import InstanceId, RequestId, Source

_GBPS = 1e9 / 8
_POLL_S = 0.02
_TIMEOUT_S = 120.0
_ANSWER = 33  # tokens: 32 decode steps
_SMALLEST = 32  # tokens of a prompt
_BURST = 12  # prompts that wait when an instance is added


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, in seconds of the controller's clock. `instance` gave its first token."""

    instance: InstanceId
    tokens: int
    arrived: float
    first: float
    finished: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One multicast from one source, as its first receiver saw it."""

    prepared: float
    started: float
    ended: float
    loaded: dict[int, float]  # units there → when


class Calibration:
    """Drives a cluster with two workers or more, manual scaling and an event log; nobody else asks or scales meanwhile.
    `say` hears every figure.
    """

    def __init__(self, client: Client, config: Config, model: ServedModel, say: Callable[[str], None],
                 repeats: int = 3) -> None:
        self._client, self._config, self._model, self._say = client, config, model, say
        self._log = _Tail(Path(config.serve.event_log))
        self._sizes = [float(unit["bytes"]) for unit in json.loads(model.manifest_json)["units"]]
        self._repeats = repeats
        self._prompts = random.Random(0)
        deadline = time.monotonic() + _TIMEOUT_S
        while len(client.status().instances) < config.cluster.pool:
            _pause(deadline, "not all workers of the pool have joined")
        self._log.mark()
        joined = [r.item for r in self._log.all() if isinstance(r.item, InstanceJoined)]
        self._joined, self._hosts = joined[0], len({event.host for event in joined})

    def run(self, name: str) -> tuple[MachineCosts, ModelCosts]:
        """Takes about a minute on a small CPU. Raises BlitzError or TimeoutError when the cluster does not follow."""
        self._settle(2)
        self._ask([self._longest(), _SMALLEST] * 4, 4)  # caches and connections have grown
        chunk_s, rpc_s = self._prefill()
        step_s, sequence_s, kv_token_s = self._decode()
        self._settle(1)
        nic, setup_s, handoff_s = self._scale_ups(chunk_s[-1], rpc_s)
        disk = self._disk(rpc_s)
        (widest, widest_s), joined, tp = chunk_s[-1], self._joined, self._config.engine.tensor_parallel
        gpus = -(-self._config.cluster.pool // self._hosts) * tp
        machine = MachineCosts(
            name, self._hosts, gpus, gpus, nic / tp / _GBPS, nic / tp / _GBPS, disk / tp / _GBPS, disk / tp / _GBPS,
            rpc_s=rpc_s, chunk_bytes=float(self._config.transfer.chunk_bytes), setup_s=setup_s, handoff_s=handoff_s)
        return machine, ModelCosts(
            self._model.spec, tp, sum(self._sizes), widest / widest_s, step_s, sequence_s, kv_token_s,
            joined.pages * joined.page_size, joined.slots, widest, joined.page_size, chunk_s, tuple(self._sizes))

    # ---- what is measured

    def _prefill(self) -> tuple[tuple[tuple[int, float], ...], float]:
        """Seconds of a chunk by size, and the way of a command: equal prompts queue, so that their first tokens are one
        chunk apart, and the first one took a chunk and a command."""
        found, ways = [], []
        size = _SMALLEST
        while size <= self._longest():
            times = []
            for _ in range(self._repeats):
                for seen in by_instance(self._ask([size] * 8, 1)):
                    if len(seen) > 1:
                        times.append((seen[-1].first - seen[0].first) / (len(seen) - 1))
                        ways.append(seen[0].first - seen[0].arrived - times[-1])
            found.append((size, statistics.median(times)))
            self._say(f"prefill of {size} tokens: {found[-1][1] * 1e3:.1f} ms")
            size *= 2
        return tuple(found), max(0.0, statistics.median(ways))

    def _longest(self) -> int:
        """Tokens of a full chunk, if the context has room for it and an answer."""
        engine = self._config.engine
        size = _SMALLEST
        while 2 * size <= engine.max_num_batched_tokens and 2 * size + _ANSWER <= engine.max_model_len:
            size *= 2
        return size

    def _decode(self) -> tuple[float, float, float]:
        """Step = a + b sequences + c tokens of KV, by least squares over batches and contexts; none is negative."""
        rows, times = [], []
        most = self._config.engine.max_num_seqs
        for batch in sorted({1, max(1, most // 4), most}):
            for tokens in (_SMALLEST, self._longest()):
                for seen in by_instance(self._ask([tokens] * 2 * batch, _ANSWER)):
                    last = seen[-1]  # all others are in the batch before it is
                    rows.append((1.0, len(seen), len(seen) * (tokens + _ANSWER / 2)))
                    times.append((last.finished - last.first) / (_ANSWER - 1))
                self._say(f"decode step of {batch} sequences of {tokens} tokens: {times[-1] * 1e3:.1f} ms")
        return fit_step(rows, times)

    def _scale_ups(self, widest: tuple[int, float], rpc_s: float) -> tuple[float, float, float]:
        """Live ones, with prompts of the widest chunk waiting. → bytes per second from one instance to another; seconds
        until the first byte, less the commands' way; seconds of a hand-off."""
        rates, setups, waits = list[float](), list[float](), list[float]()
        prefix = list(accumulate(self._sizes))
        for _ in range(self._repeats):
            mark = self._log.mark()
            helped = self._scale_under_load(mark, widest[0])
            records = self._log.since(mark)
            transfer = next(transfers_of(records))
            first, since = min(transfer.loaded.items(), default=(0, transfer.started))
            rates.append((prefix[-1] - prefix[first - 1] * (first > 0)) / (transfer.ended - since))
            whole_s = transfer.ended - transfer.prepared
            setups.append(whole_s - sum(self._sizes) / rates[-1] - 2 * rpc_s)
            self._say(f"scale-up under load: {rates[-1] * 8e-9:.2f} Gbit/s, {whole_s:.2f} s in all")
            waits += hand_offs(records, helped, self._model.spec.layers, widest[1])
            self._settle(1)
        handoff_s = max(0.0, min(waits, default=0.0))  # of the others, OLD had something else to finish first
        self._say(f"hand-off between live partners: {handoff_s * 1e3:.1f} ms, the least of {len(waits)}")
        return statistics.median(rates), max(0.0, statistics.median(setups)), handoff_s

    def _scale_under_load(self, mark: int, tokens: int) -> dict[RequestId, int]:
        """Two instances instead of one, while prompts wait. → layers that NEW ran of each."""
        with ThreadPoolExecutor(_BURST) as pool:
            answers = [pool.submit(self._client.generate, self._prompt(tokens), max_tokens=2, ignore_eos=True,
                                   timeout_s=_TIMEOUT_S, request_id=f"burst-{mark}-{k}") for k in range(_BURST)]
            self._client.scale(2, live="zigzag", source="multicast")
            helped = {f"burst-{mark}-{k}": answer.result().usage.layers_helped for k, answer in enumerate(answers)}
        self._wait_serving(2)
        self._log.mark()
        return helped

    def _disk(self, rpc_s: float) -> float:
        """Bytes per second from the checkpoint, which the system may hold in its memory."""
        times = []
        for _ in range(self._repeats):
            records = self._scale(2, "disk")
            began = next(r.at for r in records if isinstance(r.item, LoadFromDisk))
            times.append(next(r.at for r in records if isinstance(r.item, TransferEnded)) - began - rpc_s)
            self._settle(1)
        self._say(f"load from disk: {statistics.median(times):.2f} s")
        return sum(self._sizes) / max(statistics.median(times), 1e-3)

    # ---- the cluster

    def _prompt(self, tokens: int) -> list[int]:
        """No two begin alike."""
        return [self._prompts.randrange(self._model.spec.vocab) for _ in range(tokens)]

    def _ask(self, prompts: Sequence[int], answer: int) -> list[Seen]:
        """Prompts of these sizes, all at once; in the order of arrival."""
        mark = self._log.mark()
        with ThreadPoolExecutor(len(prompts)) as pool:
            for result in [pool.submit(self._client.generate, self._prompt(tokens), max_tokens=answer, ignore_eos=True,
                                       timeout_s=_TIMEOUT_S) for tokens in prompts]:
                result.result()
        deadline = time.monotonic() + _TIMEOUT_S
        while len(seen := requests_of(self._log.since(mark))) < len(prompts):
            _pause(deadline, "the event log does not grow")
        return seen

    def _scale(self, target: int, source: Source) -> list[Record]:
        """→ what the log says of the scale-up."""
        mark = self._log.mark()
        self._client.scale(target, live="off", source=source)
        self._wait_serving(target)
        self._log.mark()
        return self._log.since(mark)

    def _settle(self, serving: int) -> None:
        self._client.scale(serving, live="off", source="multicast")
        self._wait_serving(serving)

    def _wait_serving(self, serving: int) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            status = self._client.status()
            phases = [i.phase for i in status.instances]
            busy = status.queued_requests or status.running_requests
            if phases.count("serving") == serving and phases.count("idle") == len(phases) - serving and not busy:
                return
            _pause(deadline, f"not {serving} instances: {phases}")


class _Tail:
    """An event log that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[Record]:
        return list(eventlog.read(self._path))

    def mark(self) -> int:
        """Whatever is in the log now was before. The controller writes every tick."""
        time.sleep(0.2)
        return len(self.all())

    def since(self, mark: int) -> list[Record]:
        return self.all()[mark:]


def _pause(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise BlitzError(f"calibration: {why} after {_TIMEOUT_S:g} s")
    time.sleep(_POLL_S)


def requests_of(records: list[Record]) -> list[Seen]:
    """Those that finished."""
    arrived: dict[RequestId, tuple[int, float]] = {}
    first: dict[RequestId, tuple[InstanceId, float]] = {}
    seen = {}
    for record in records:
        match record.item:
            case RequestArrived(at, request):
                arrived[request.id] = (request.prompt_tokens, at)
            case PrefillDone(at, instance, request_id):
                first[request_id] = (instance, at)
            case RequestFinished(at, _, request_id) if request_id in arrived:
                instance, began = first[request_id]
                seen[request_id] = Seen(instance, *arrived[request_id], began, at)
    return [seen[request_id] for request_id in arrived if request_id in seen]


def by_instance(seen: list[Seen]) -> list[list[Seen]]:
    """In order of their first tokens."""
    found: dict[InstanceId, list[Seen]] = {}
    for one in sorted(seen, key=lambda s: s.first):
        found.setdefault(one.instance, []).append(one)
    return list(found.values())


def hand_offs(records: list[Record], helped: Mapping[RequestId, int], layers: int, whole_s: float) -> Iterator[float]:
    """Seconds from NEW's word that it handed a prompt over to OLD's first token, less the layers that OLD ran.

    `helped`: how many of the `layers` NEW ran; a whole prompt takes `whole_s`.
    """
    handed: dict[RequestId, float] = {}
    for record in records:
        match record.item:
            case RequestHanded(at, instance, request_id, _, target) if instance != target:
                handed[request_id] = at
            case PrefillDone(at, _, request_id) if request_id in handed and helped[request_id.rpartition("#")[0]]:
                rest = 1 - helped[request_id.rpartition("#")[0]] / layers
                yield at - handed[request_id] - rest * whole_s


def transfers_of(records: list[Record]) -> Iterator[Transfer]:
    """Multicasts that ended at a receiver, each as the first one did."""
    prepared: dict[int, float] = {}
    started: dict[int, float] = {}
    sources: dict[int, set[InstanceId]] = {}
    loaded: dict[int, float] = {}
    for record in records:
        match record.item:
            case PrepareTransfer(_, plan):
                prepared.setdefault(plan.ticket, record.at)
                sources[plan.ticket] = {chain.instances[0] for chain in plan.chains}
                loaded = {}
            case StartTransfer(_, ticket):
                started.setdefault(ticket, record.at)
            case LayerLoaded(at, _, units):
                loaded.setdefault(units, at)
            case TransferEnded(at, instance, ticket) if ticket in started and instance not in sources[ticket]:
                yield Transfer(prepared.pop(ticket), started.pop(ticket), at, loaded)


def fit_step(rows: Sequence[tuple[float, ...]], times: list[float]) -> tuple[float, float, float]:
    """Least squares of relative errors without negative factors: one that would be negative is nothing."""
    weights = 1 / np.asarray(times)
    matrix = np.asarray(rows) * weights[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, used], np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all():
            factors = dict(zip(used, found.tolist(), strict=True))
            return factors.get(0, 0.0), factors.get(1, 0.0), factors.get(2, 0.0)
        del used[int(np.argmin(found))]

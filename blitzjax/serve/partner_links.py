"""What two live partners say to each other, from worker to worker.

OLD opens the session. Invariant: when it ends, whoever ends it, each side hears so once, after all that was said in it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import grpc

from blitzjax import types
from blitzjax.engine import messages as m
from blitzjax.serve import codec
from blitzjax.serve.channels import TO_WORKER
from blitzjax.serve.sessions import Outbox
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

log = logging.getLogger("blitzjax.worker")


class OldLink:
    """NEW's answers and requests to OLD. See messages.Old."""

    def __init__(self, name: types.InstanceId, model: str, outbox: Outbox) -> None:
        self.name, self.model, self._outbox = name, model, outbox

    def hand_over(self, answer: m.HandOver) -> None:
        self._outbox.put(_encode_hand_off(answer))

    def borrow(self, borrow: m.Borrow) -> None:
        event = pb.WorkerEvent()
        codec.fill(event.borrow, borrow)
        self._outbox.put(event)


class PartnerLink:
    """OLD's session with NEW: pulls and loans go out, what NEW says comes back into the inbox. See messages.Partner."""

    def __init__(self, address: str, me: types.InstanceId, partner: types.InstanceId, model: str,
                 post: Callable[[object], None]) -> None:
        self._me, self._partner, self._post = me, partner, post
        self._commands: list[pb.WorkerCommand | None] = [
            pb.WorkerCommand(partner=pb.Partner(instance=me, model=model))]
        self._ready = threading.Condition()
        self._channel = grpc.insecure_channel(address, options=TO_WORKER)
        threading.Thread(target=self._run, name=f"partner-{partner}", daemon=True).start()

    def pull(self, seq: int) -> None:
        self._put(pb.WorkerCommand(pull=pb.Pull(seq=seq)))

    def lend(self, loan: m.Loan) -> None:
        command = pb.WorkerCommand()
        codec.fill(command.loan, loan)
        self._put(command)

    def taken(self, seq: int) -> None:
        self._put(pb.WorkerCommand(taken=pb.Taken(seq=seq)))

    def close(self) -> None:
        """Ends the session once everything sent before is on its way."""
        self._put(None)

    def _put(self, command: pb.WorkerCommand | None) -> None:
        with self._ready:
            self._commands.append(command)
            self._ready.notify()

    def _outgoing(self) -> Iterator[pb.WorkerCommand]:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._commands)
                command = self._commands.pop(0)
            if command is None:
                return
            yield command

    def _run(self) -> None:
        try:
            for event in rpc.WorkerStub(self._channel).Run(self._outgoing()):
                if event.WhichOneof("event") == "borrow":
                    self._post(m.Borrowed(self, codec.decode(m.Borrow, event.borrow)))
                else:
                    self._post(m.HandedOver(self, _decode_hand_off(event.hand_off)))
        except grpc.RpcError as e:
            log.warning("%s: session with live partner %s broke: %s", self._me, self._partner, e.details())
        self._post(m.PartnerLost(self))
        self._channel.close()


def _encode_hand_off(answer: m.HandOver) -> pb.WorkerEvent:
    out = pb.WorkerEvent(hand_off=pb.HandOff(
        seq=answer.seq, next_layer=answer.next_layer, address=answer.address, activation_uuid=answer.activation_uuid,
        kv_uuids=answer.kv_uuids, drained=answer.drained, layout=answer.layout))
    if answer.work is not None:
        out.hand_off.work.CopyFrom(codec.encode_work(answer.work))
    return out


def _decode_hand_off(message: pb.HandOff) -> m.HandOver:
    work = codec.decode_work(message.work) if message.HasField("work") else None
    return m.HandOver(message.seq, work, message.next_layer, message.address, message.activation_uuid,
                      tuple(message.kv_uuids), message.drained, message.layout)

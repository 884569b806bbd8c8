"""Both ends of the session in which one worker offers a request's KV to another: one offer out, one answer back.

The session is the offer's life: its end without an answer, whoever caused it, makes the offer void for both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import grpc

from blitzjax.engine import messages as m
from blitzjax.serve import codec
from blitzjax.serve.channels import TO_WORKER
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

log = logging.getLogger("blitzjax.worker")


class KVCourier:
    """The source's end. See messages.KVSession."""

    def __init__(self, address: str, offer: m.KVOffer, post: Callable[[object], None]) -> None:
        self._address, self._offer, self._post = address, offer, post
        self._closed = False
        command = pb.WorkerCommand()
        codec.fill(command.kv_offer, offer)
        self._channel = grpc.insecure_channel(address, options=TO_WORKER)
        self._call = rpc.WorkerStub(self._channel).Run(iter((command,)))
        threading.Thread(target=self._run, name="offer-kv", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    def _run(self) -> None:
        answer = None
        try:
            answer = next(self._call, None)
        except grpc.RpcError as e:
            if not self._closed:
                log.warning("%s does not answer an offer of KV: %s", self._address, e.details())
        self._post(m.KVUnanswered(self._offer) if answer is None else m.KVAnswered(self._offer, answer.kv_answer.error))
        self._channel.close()


class KVReply:
    """The target's end. See messages.KVSource."""

    def __init__(self, outbox) -> None:
        self._outbox = outbox

    def answer(self, error: str) -> None:
        self._outbox.put(pb.WorkerEvent(kv_answer=pb.KVAnswer(error=error)))
        self._outbox.close()

"""A small Python client: `Client` for scripts, `AsyncClient` for programs with many streams. Needs grpc only.

`grpcs://HOST:PORT` is TLS; `cacert`, a PEM file, is of who may have signed the server's certificate. `api_key` None means
$BLITZJAX_API_KEY. Failures are the exceptions of blitzjax/errors.py; other gRPC statuses (DEADLINE_EXCEEDED, say) are a
BlitzError with that `code`. A connection that breaks, or a server that crashes and resumes (rejoin.py), is not one:
calls go on. So a server must be told of an answer that nobody wants any more: closing its iterator, or the client, does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blitzjax.serve import access
from blitzjax.serve.asking import (Chunk, Options, Prompt, Result, Tools, chunk_of, collect, collect_all,
                                   generate_request)
from blitzjax.serve.bundle import Bundle
from blitzjax.serve.channels import TO_CONTROLLER
from blitzjax.serve.rejoin import Patience, Rejoin, Server
from blitzjax.types import LiveMode, Source
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

_POLL_S = 0.05
_LEAVE_S = 5.0  # to tell the server; what it does not hear it ends itself when its patience does


class Client:
    """Blocking. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None, cacert: Path | None = None):
        self._metadata = access.metadata(api_key)
        self._channel = access.channel(grpc, address, TO_CONTROLLER, cacert)
        self._stub = rpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._server = Server(address)
        self._running: dict[str, str] = {}  # request ids, by key
        self.address = address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._leave(*self._running)
        self._channel.close()

    def _leave(self, *keys: str) -> None:
        """Nobody waits for these requests any more."""
        left = [self._running.pop(key) for key in keys if key in self._running]
        with contextlib.suppress(grpc.RpcError):
            if left:
                self._stub.Abort(pb.AbortRequest(request_ids=left), timeout=_LEAVE_S, metadata=self._metadata)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Waits for the whole answer."""
        return collect(list(self.stream(prompt, **options)))

    def generate_all(self, prompt: Prompt, **options: Unpack[Options]) -> list[Result]:
        """Waits for all n answers, in order."""
        return collect_all(list(self.stream(prompt, **options)))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[Chunk]:
        """Chunks as they come; closing the iterator ends the generation. Goes on where it was if the connection
        breaks, or the server crashes, and it has said that it resumes.
        """
        patience = Patience(self._server, options.get("timeout_s"))
        rejoin = Rejoin(generate_request(prompt, options), patience)
        self._running[rejoin.request.key] = rejoin.request.request_id
        try:
            while not patience.over:
                call = self._stub.Generate(rejoin.request, timeout=patience.left_s, metadata=self._metadata)
                try:
                    for message in call:
                        if (new := rejoin.unseen(message)) is not None:
                            yield chunk_of(new, patience.started)
                    self._server.said(call.initial_metadata())
                    patience.over = True
                except grpc.RpcError as e:
                    pause_s = patience.pause_after(e, call.initial_metadata(), call.trailing_metadata())
                    time.sleep(pause_s)
                    rejoin.restart()
                finally:
                    call.cancel()
        finally:
            if not patience.over:
                self._leave(rejoin.request.key)
            self._running.pop(rejoin.request.key, None)

    def tokenize(self, prompt: Prompt, *, model: str = "", tools: Tools = (),
                 timeout_s: float | None = 10.0) -> pb.TokenizeResponse:
        """The prompt as `generate` would have it: token ids and text, whichever was given."""
        return self._unary(self._stub.Tokenize, generate_request(prompt, Options(model=model, tools=tools)), timeout_s)

    def abort(self, *request_ids: str) -> None:
        self._unary(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), None)

    def status(self, timeout_s: float | None = 10.0) -> pb.ClusterStatus:
        return self._unary(self._stub.Status, pb.StatusRequest(), timeout_s)

    def scale(self, target: int, *, model: str = "", live: LiveMode | None = None, source: Source | None = None,
              wait: bool = False, timeout_s: float | None = None) -> pb.ScaleResponse:
        """Asks for `target` instances; with `wait`, returns when exactly that many serve and none loads. One model
        needs no name.
        """
        return self._unary(
            self._stub.Scale,
            pb.ScaleRequest(target=target, live=live, source=source, wait=wait, model=model), timeout_s)

    def deploy(self, directory: str | Path, *, served_model_name: str = "", min_instances: int | None = None,
               max_instances: int | None = None, timeout_s: float | None = None) -> pb.DeployResponse:
        """Serves one more converted checkpoint, under its own name or another; returns when workers are compiled for it."""
        return self._unary(self._stub.Deploy, deploy_request(directory, served_model_name, min_instances, max_instances),
                           timeout_s)

    def undeploy(self, model: str, timeout_s: float | None = None) -> pb.UndeployResponse:
        """Returns when the model's requests have ended and no worker holds it."""
        return self._unary(self._stub.Undeploy, pb.UndeployRequest(model=model), timeout_s)

    def watch(self, timeout_s: float | None = None) -> Iterator[pb.ClusterStatus]:
        """The cluster now and after every change; closing the iterator ends the call."""
        patience = Patience(self._server, timeout_s)
        while True:
            call = self._stub.WatchScale(pb.WatchScaleRequest(), timeout=patience.left_s, metadata=self._metadata)
            try:
                for picture in call:
                    patience.heard()
                    yield picture
                return
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, call.initial_metadata(), call.trailing_metadata())
            finally:
                call.cancel()
            time.sleep(pause_s)

    def ready(self) -> bool:
        """True when at least one instance serves, or a model that has none can have one at once."""
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} is not ready after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def _unary(self, method: grpc.UnaryUnaryMultiCallable, request, timeout_s: float | None):
        patience = Patience(self._server, timeout_s)
        while True:
            try:
                reply, call = method.with_call(request, timeout=patience.left_s, metadata=self._metadata)
                self._server.said(call.initial_metadata())
                return reply
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, e.initial_metadata(), e.trailing_metadata())
            time.sleep(pause_s)
            _ask_again(request)


class AsyncClient:
    """The same on asyncio; make it inside the event loop."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None, cacert: Path | None = None):
        self._metadata = access.metadata(api_key)
        self._channel = access.channel(grpc.aio, address, TO_CONTROLLER, cacert)
        self._stub = rpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._server = Server(address)
        self._bundle = Bundle(lambda requests: self._stub.Relay(requests, metadata=self._metadata), self._server)
        self._running: dict[str, str] = {}  # request ids, by key
        self.address = address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._leave(*self._running)
        await self._bundle.close()
        await self._channel.close()

    async def _leave(self, *keys: str) -> None:
        """Nobody waits for these requests any more."""
        left = [self._running.pop(key) for key in keys if key in self._running]
        with contextlib.suppress(grpc.RpcError):
            if left:
                await self._stub.Abort(pb.AbortRequest(request_ids=left), timeout=_LEAVE_S, metadata=self._metadata)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Waits for the whole answer."""
        return collect([chunk async for chunk in self.stream(prompt, **options)])

    async def generate_all(self, prompt: Prompt, **options: Unpack[Options]) -> list[Result]:
        """Waits for all n answers, in order."""
        return collect_all([chunk async for chunk in self.stream(prompt, **options)])

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Chunk]:
        """Chunks as they come; closing the iterator ends the generation. Goes on where it was if the connection
        breaks, or the server crashes, and it has said that it resumes.
        """
        patience = Patience(self._server, options.get("timeout_s"))
        rejoin = Rejoin(generate_request(prompt, options), patience)
        self._running[rejoin.request.key] = rejoin.request.request_id
        try:
            while not patience.over:
                try:
                    async with contextlib.aclosing(self._bundle.generate(rejoin.request, patience.left_s)) as call:
                        async for message in call:
                            if (new := rejoin.unseen(message)) is not None:
                                yield chunk_of(new, patience.started)
                    patience.over = True
                except grpc.aio.AioRpcError as e:
                    await asyncio.sleep(patience.pause_after(e, e.initial_metadata(), e.trailing_metadata()))
                    rejoin.restart()
        finally:
            if not patience.over:
                await self._leave(rejoin.request.key)
            self._running.pop(rejoin.request.key, None)

    async def tokenize(self, prompt: Prompt, *, model: str = "", tools: Tools = (),
                       timeout_s: float | None = 10.0) -> pb.TokenizeResponse:
        """The prompt as `generate` would have it: token ids and text, whichever was given."""
        return await self._unary(
            self._stub.Tokenize, generate_request(prompt, Options(model=model, tools=tools)), timeout_s)

    async def abort(self, *request_ids: str) -> None:
        await self._unary(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), None)

    async def status(self, timeout_s: float | None = 10.0) -> pb.ClusterStatus:
        return await self._unary(self._stub.Status, pb.StatusRequest(), timeout_s)

    async def scale(self, target: int, *, model: str = "", live: LiveMode | None = None,
                    source: Source | None = None, wait: bool = False,
                    timeout_s: float | None = None) -> pb.ScaleResponse:
        """Asks for `target` instances; with `wait`, returns when exactly that many serve and none loads. One model
        needs no name.
        """
        return await self._unary(
            self._stub.Scale,
            pb.ScaleRequest(target=target, live=live, source=source, wait=wait, model=model), timeout_s)

    async def deploy(self, directory: str | Path, *, served_model_name: str = "", min_instances: int | None = None,
                     max_instances: int | None = None, timeout_s: float | None = None) -> pb.DeployResponse:
        """Serves one more converted checkpoint, under its own name or another; returns when workers are compiled for it."""
        return await self._unary(
            self._stub.Deploy, deploy_request(directory, served_model_name, min_instances, max_instances), timeout_s)

    async def undeploy(self, model: str, timeout_s: float | None = None) -> pb.UndeployResponse:
        """Returns when the model's requests have ended and no worker holds it."""
        return await self._unary(self._stub.Undeploy, pb.UndeployRequest(model=model), timeout_s)

    async def watch(self, timeout_s: float | None = None) -> AsyncIterator[pb.ClusterStatus]:
        """The cluster now and after every change; closing the iterator ends the call."""
        patience = Patience(self._server, timeout_s)
        while True:
            call = self._stub.WatchScale(pb.WatchScaleRequest(), timeout=patience.left_s, metadata=self._metadata)
            try:
                async for picture in call:
                    patience.heard()
                    yield picture
                return
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, await call.initial_metadata(), await call.trailing_metadata())
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def ready(self) -> bool:
        """True when at least one instance serves, or a model that has none can have one at once."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not await self.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} is not ready after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _unary(self, method: grpc.aio.UnaryUnaryMultiCallable, request, timeout_s: float | None):
        patience = Patience(self._server, timeout_s)
        while True:
            call = method(request, timeout=patience.left_s, metadata=self._metadata)
            try:
                reply = await call
                self._server.said(await call.initial_metadata())
                return reply
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, await call.initial_metadata(), await call.trailing_metadata())
            await asyncio.sleep(pause_s)
            _ask_again(request)


def _ask_again(request: Message) -> None:
    """What its last call had begun is no mistake of the next one."""
    if "resume" in request.DESCRIPTOR.fields_by_name:
        setattr(request, "resume", True)


def deploy_request(directory: str | Path, served_model_name: str, min_instances: int | None,
                   max_instances: int | None) -> pb.DeployRequest:
    return pb.DeployRequest(directory=str(Path(directory).resolve()), served_model_name=served_model_name,
                            min_instances=min_instances, max_instances=max_instances)

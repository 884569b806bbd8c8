"""How does a controller listen? Its gRPC server, health, and what signals ask of it.

Invariant: whoever calls has an answer before the process ends, within `serve.shutdown_timeout_s` or a second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import typing
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blitzjax.addresses import check_free, joined
from blitzjax.errors import BlitzError
from blitzjax.serve.access import KeyCheck
from blitzjax.serve.channels import CONTROLLER_SERVER
from blitzjax.serve.frontend import SERVICE, Frontend, picture
from blitzjax.serve.metrics import endpoint, render
from blitzjax.serve.rundir import PRIVATE
from blitzjax.serve.vllm_engine import SERVICE as VLLM_SERVICE, VllmEngine
from blitzjax.v1 import inference_pb2_grpc as rpc
from blitzjax.v1 import vllm_engine_pb2_grpc as vllm_rpc

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller

_log = logging.getLogger("blitzjax.controller")
_GRACE_S = 2.0  # at most: open streams have their last word first


class Stop:
    """SIGTERM and SIGINT: the first asks to drain, the second to leave at once."""

    def __init__(self):
        self.drain, self.now = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self.now if self.drain.is_set() else self.drain).set()


async def serve(controller: Controller, key: str, credentials: grpc.ServerCredentials | None, path: Path | None) -> None:
    """Serves until signalled or broken, callers who send `key`; with `credentials` over TLS, but on the Unix socket
    `path`. Raises BlitzError when it cannot listen or no worker can serve.
    """
    host = controller.config.serve.host
    server = grpc.aio.server(interceptors=[KeyCheck(key)] if key else [], options=CONTROLLER_SERVER)
    checker = health.aio.HealthServicer()
    rpc.add_InferenceServicer_to_server(Frontend(controller), server)
    vllm_rpc.add_VllmEngineServicer_to_server(VllmEngine(controller), server)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection((SERVICE, VLLM_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    stop = Stop()
    await _set_health(checker, False)
    address = _listen(server, joined(host, controller.config.serve.port), credentials, path)
    await server.start()
    with contextlib.suppress(OSError):  # a full disk
        print(f"controller of {', '.join(controller.models)} listens on {address}", flush=True)
    try:
        async with (_metrics(controller, host), background(controller.run(), _keep_health(controller, checker),
                                                           _drain(controller, checker, stop)) as ended):
            await ended  # raises what broke, while it drains, too
            controller.give_up()
            await server.stop(_GRACE_S)
    finally:
        await server.stop(0)
    controller.close()


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None,
            path: Path | None) -> str:
    """→ `address` with the port that it has now."""
    check_free(address)
    where = address
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        if path is not None:
            where = f"the Unix socket {path}"  # its path may be too long
            path.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
            server.add_insecure_port(f"unix:{path}")
    except (RuntimeError, OSError) as e:
        raise BlitzError(f"cannot listen on {where}") from e
    return f"{address.rpartition(':')[0]}:{port}"


def _metrics(controller: Controller, host: str) -> contextlib.AbstractAsyncContextManager[None]:
    def text() -> str:
        now = picture(controller)
        return render(now, {model.name: controller.latencies[model.name] for model in now.models})  # from 0 on

    return endpoint(text, lambda: controller.ready and not controller.draining, host,
                    controller.config.serve.metrics_port)


async def _drain(controller: Controller, checker: health.aio.HealthServicer, stop: Stop) -> None:
    """When signalled: unready at once; answers in flight may finish until the timeout or a second signal."""
    await stop.drain.wait()
    controller.draining = True
    await checker.enter_graceful_shutdown()
    _log.info("shutting down; a second signal leaves at once")
    left = asyncio.get_running_loop().time() + controller.config.serve.shutdown_timeout_s
    with controller.subscribe() as changed:
        while controller.busy and not stop.now.is_set() and asyncio.get_running_loop().time() < left:
            changed.clear()
            await changed.wait()  # at the latest the next tick


async def _keep_health(controller: Controller, checker: health.aio.HealthServicer) -> None:
    ready = False
    with controller.subscribe() as changed:
        while True:
            await changed.wait()
            changed.clear()
            if ready != controller.ready:
                ready = not ready
                await _set_health(checker, ready)


async def _set_health(checker: health.aio.HealthServicer, ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE, VLLM_SERVICE):
        await checker.set(name, status)


@contextlib.asynccontextmanager
async def background(*work: typing.Coroutine[None, None, object]) -> AsyncIterator[typing.Awaitable[None]]:
    """Runs coroutines beside the block; yields a wait for whichever ends first. All are cancelled at the end."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        yield _first(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(tasks: Sequence[asyncio.Future[object]]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()

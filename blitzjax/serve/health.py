"""May clients come? The standard health service of the controller, NOT_SERVING until a model can answer."""

from __future__ import annotations

import typing

from grpc_health.v1 import health, health_pb2

from blitzjax.serve.frontend import SERVICE

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller


async def keep_health(controller: Controller, checker: health.aio.HealthServicer) -> None:
    ready = False
    with controller.subscribe() as changed:
        while True:
            await changed.wait()
            changed.clear()
            if ready != controller.ready:
                ready = not ready
                await set_health(checker, ready)


async def set_health(checker: health.aio.HealthServicer, ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE):
        await checker.set(name, status)

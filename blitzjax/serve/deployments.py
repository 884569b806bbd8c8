"""How does a running cluster take on one more model, and lose one?

Invariant: a Deploy that fails leaves nothing behind; an Undeploy returns when no worker holds the model any more.
"""

from __future__ import annotations

import asyncio
import typing
from pathlib import Path

from blitzjax.errors import BlitzError, InvalidRequest
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.events import ModelUndeployed
from blitzjax.types import InstanceId
from blitzjax.v1 import inference_pb2 as pb

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller


async def deploy(controller: Controller, request: pb.DeployRequest) -> pb.DeployResponse:
    """Returns once the workers that are here are compiled for it. Raises InvalidRequest or what a worker says."""
    started = controller.now()
    model = await asyncio.to_thread(load_model, Path(request.directory))
    if model.name in controller.models:
        raise InvalidRequest(f"a model named {model.name!r} is deployed already")
    least = request.min_instances if request.HasField("min_instances") else None
    most = request.max_instances if request.HasField("max_instances") else None
    _check_bounds(controller, least, most)
    with controller.subscribe() as changed:
        awaited = _add(controller, model, least, most)
        while missing := [i for i in awaited if controller.links[i].joined
                          and (i, model.name) not in controller.compiled]:
            refusal = next((controller.refusals.pop((i, model.name)) for i in missing
                            if (i, model.name) in controller.refusals), None)
            if refusal is not None:
                await undeploy(controller, model.name)
                raise BlitzError(f"a worker cannot serve {model.name}: {refusal}")
            changed.clear()
            await changed.wait()
    return pb.DeployResponse(model=model.name, seconds=controller.now() - started)


async def undeploy(controller: Controller, name: str) -> pb.UndeployResponse:
    """Returns once its requests have ended and its parameters are dropped. Raises UnknownModel."""
    started, name = controller.now(), controller.find(name).name
    with controller.subscribe() as changed:
        controller.on_event(ModelUndeployed(controller.now(), name))
        while any(m.name == name for m in controller.status().models):
            changed.clear()
            await changed.wait()
    if name in controller.models:  # nobody else waited for the same
        _remove(controller, name)
    return pb.UndeployResponse(seconds=controller.now() - started)


def _add(controller: Controller, model: ServedModel, least: int | None, most: int | None) -> list[InstanceId]:
    """Deploys it in the brain and on every worker. → those that are here now, which will say when they are ready."""
    controller.deploy(model, least, most)
    return [link.instance for link in controller.links.values() if link.joined]


def _remove(controller: Controller, name: str) -> None:
    """Nothing of the model is left in the brain."""
    controller.remove(name)
    controller.compiled -= {(link.instance, name) for link in controller.links.values()}


def _check_bounds(controller: Controller, least: int | None, most: int | None) -> None:
    scale, pool = controller.config.scale, controller.pool
    least = scale.min_instances if least is None else least
    most = scale.max_instances if most is None else most
    if not 0 <= least <= most or most < 1:
        raise InvalidRequest(f"instances must be 0 <= min ({least}) <= max ({most}), max at least 1")
    promised = sum(m.least for m in controller.status().models)
    if promised + least > pool:
        raise InvalidRequest(f"the pool has {pool} workers, {promised} of them promised to other models; "
                             f"min_instances {least} does not fit")

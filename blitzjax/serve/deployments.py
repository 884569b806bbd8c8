"""How does a running cluster take on one more model, and lose one?

Invariant: a Deploy that fails leaves nothing behind; an Undeploy returns when no worker holds the model any more. Both
can be asked for again, to go on, of the controller that takes over from one that died.
"""

from __future__ import annotations

import asyncio
import typing
from pathlib import Path

from blitzjax.errors import BlitzError, InvalidRequest
from blitzjax.serve.model import load_model
from blitzjax.events import ModelUndeployed
from blitzjax.v1 import inference_pb2 as pb

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller


async def deploy(controller: Controller, request: pb.DeployRequest) -> pb.DeployResponse:
    """Returns once the workers that are here are compiled for it, and one of them is still here.

    Raises InvalidRequest, or what a worker says.
    """
    started = controller.now()
    model = await asyncio.to_thread(load_model, Path(request.directory), request.served_model_name)
    known = controller.models.get(model.name)
    if known is not None and not (request.resume and known.directory == model.directory):
        raise InvalidRequest(f"a model named {model.name!r} is deployed already")
    least = request.min_instances if request.HasField("min_instances") else None
    most = request.max_instances if request.HasField("max_instances") else None
    with controller.subscribe() as changed:
        if known is None:
            _check_bounds(controller, least, most)
            controller.deploy(model, least, most)
        deployed = controller.models[model.name]
        awaited = {link.instance: link for link in controller.links.values() if link.joined}
        while (missing := [i for i in controller.replica.cluster.uncompiled(model.name) if i in awaited]) or (
                awaited and not any(link.joined for link in awaited.values())):  # compiling may be what they died of
            controller.check_open()
            if controller.models.get(model.name) is not deployed:
                raise BlitzError(f"{model.name} was undeployed")
            refusal = next((controller.refusals.pop((i, model.name)) for i in missing
                            if (i, model.name) in controller.refusals), None)
            if refusal is not None:
                await undeploy(controller, model.name)
                raise BlitzError(f"a worker cannot serve {model.name}: {refusal}")
            changed.clear()
            await changed.wait()
    return pb.DeployResponse(model=model.name, seconds=controller.now() - started)


async def undeploy(controller: Controller, name: str, resume: bool = False) -> pb.UndeployResponse:
    """Returns once its requests have ended and its parameters are dropped. Raises InvalidRequest without a name, for it
    cannot be undone, and UnknownModel, unless it was asked for before and may be done.
    """
    started = controller.now()
    if not name:
        raise InvalidRequest(f"say which model to undeploy: {', '.join(controller.models) or 'none is deployed'}")
    if resume and name not in controller.models:
        return pb.UndeployResponse()
    name = controller.find(name).name
    with controller.subscribe() as changed:
        controller.on_event(ModelUndeployed(controller.now(), name))
        while name in controller.models:
            controller.check_open()
            changed.clear()
            await changed.wait()
    return pb.UndeployResponse(seconds=controller.now() - started)


def _check_bounds(controller: Controller, least: int | None, most: int | None) -> None:
    scale, pool = controller.config.scale, controller.pool
    least = scale.min_instances if least is None else least
    most = scale.max_instances if most is None else most
    decode = scale.min_decode if scale.roles == "split" else 0  # besides, of each model
    if not min(decode, 1) <= least <= most - decode or most < 1:
        besides = f" - {decode} that decode" if decode else ""
        raise InvalidRequest(f"instances must be {min(decode, 1)} <= min ({least}) <= max ({most}){besides}, max at least 1")
    promised = sum(m.least + decode for m in controller.status().models)
    if promised + least + decode > pool:
        raise InvalidRequest(f"the pool has {pool} workers, {promised} of them promised to other models; "
                             f"min_instances {least}{f' + {decode} that decode' if decode else ''} does not fit")

"""A controller in this process, and what happens to it besides crashes: models that leave, disks that are full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import signal
from dataclasses import replace

import pytest
from test_resume import Toys, answered, ended, eventually, in_a_loop, order
from toy import SPEC, toy_config, write_model
from toy_worker import Toy

from blitzjax.errors import InvalidRequest, UnknownModel
from blitzjax.serve import deployments, journal as journals
from blitzjax.serve.controller import Controller
from blitzjax.serve.links import WorkerLink
from blitzjax.serve.model import load_model
from blitzjax.serve.resume import with_journal
from blitzjax.serve.server import serve
from blitzjax.v1 import inference_pb2


@pytest.fixture
def toys(model_dir, tmp_path):
    return lambda *overrides: Toys(toy_config(*overrides), load_model(model_dir), tmp_path)


@in_a_loop
async def test_an_order_for_a_model_that_left_while_its_prompt_was_tokenized(toys, tmp_path):
    second = load_model(write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd")))
    async with toys("cluster.pool=2") as world:
        controller = world.start()
        await world.serving(1)
        controller.deploy(second, 0, None)
        await deployments.undeploy(controller, "2nd")
        with pytest.raises(UnknownModel, match="no model '2nd' here; served: toy"):
            controller.submit(order("late", 1, model="2nd"))
        assert list((await world.restart()).models) == ["toy"]


@in_a_loop
async def test_an_undeployed_model_goes_whether_or_not_its_caller_waits(toys, tmp_path):
    second = load_model(write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd")))
    async with toys("cluster.pool=2") as world:
        controller = world.start()
        await world.serving(1)
        controller.deploy(second, 1, None)
        await world.serving(2)
        [answer] = controller.submit(order("r", 1, 20, model="2nd"))
        await eventually(lambda: answer.generated)
        caller = asyncio.create_task(deployments.undeploy(controller, "2nd"))
        await asyncio.sleep(0.01)
        caller.cancel()
        await ended(answer)
        assert answer.generated == answered(1, 20)
        await eventually(lambda: "2nd" not in controller.models)
        await eventually(lambda: all(set(worker.toy.specs) == {"toy"} for worker in world.workers))


@in_a_loop
async def test_what_workers_said_of_an_earlier_try_is_not_held_against_a_model(toys, tmp_path):
    directory = write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd"))
    async with toys("cluster.pool=2") as world:
        controller = world.start()
        await eventually(lambda: all(link.joined for link in controller.links.values()))
        request = inference_pb2.DeployRequest(directory=str(directory), min_instances=0)
        controller.on_refused("i1", "its file is truncated", "2nd")  # i0 was heard first, and ended that try
        assert (await deployments.deploy(controller, request)).model == "2nd"


@in_a_loop
async def test_a_model_whose_workers_all_died_while_they_compiled_it_is_not_deployed_yet(toys, tmp_path, monkeypatch):
    directory = write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd"))
    told, compiling = Toy.told, []
    monkeypatch.setattr(Toy, "told", lambda toy, said: compiling.append(toy) if said.HasField("deploy") else told(toy, said))
    async with toys("cluster.pool=2") as world:
        world.proxied()
        controller = world.start()

        async def deployed() -> list[bool]:
            await deployments.deploy(controller, inference_pb2.DeployRequest(directory=str(directory), min_instances=0))
            return [link.joined for link in controller.links.values()]

        await eventually(lambda: all(link.joined for link in controller.links.values()))
        waiting = asyncio.create_task(deployed())
        await eventually(lambda: len(compiling) == 2)
        for worker in world.workers:
            worker.die()
        world.cut(silent=False)
        assert any(await waiting)


@in_a_loop
async def test_a_link_that_dials_ends_with_its_controller(toys, monkeypatch):
    """Also where gRPC swallows that it is cancelled, as it does while it sends what a call begins with."""
    dialing = asyncio.Event()

    async def swallowed(link: WorkerLink) -> str:
        monkeypatch.undo()
        dialing.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "over"

    async with toys("cluster.pool=1") as world:
        monkeypatch.setattr(WorkerLink, "_session", swallowed)
        world.start()
        await dialing.wait()
        world._running.cancel()
        await asyncio.wait([world._running], timeout=60)
        assert world._running.cancelled()


@in_a_loop
async def test_with_split_roles_a_model_gets_instances_of_both_or_is_refused(toys, tmp_path):
    directory = write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd"))
    async with toys("cluster.pool=2", "scale.roles=split") as world:
        controller = world.start()
        for bounds, says in (({"min_instances": 0}, "1 <= min"), ({"max_instances": 1}, r"max \(1\) - 1 that decode"),
                             ({}, "2 workers, 2 of them promised")):
            with pytest.raises(InvalidRequest, match=says):
                await deployments.deploy(controller, inference_pb2.DeployRequest(directory=str(directory), **bounds))


@in_a_loop
@pytest.mark.parametrize("full", ["events", "journal"])
async def test_a_full_disk_costs_a_log_and_no_answer(toys, tmp_path, caplog, full: str):
    async with toys(f"serve.event_log={tmp_path / 'events'}") as world:
        controller = world.start()
        await world.serving(1)
        if full == "events":
            controller.replica.event_log._file = open("/dev/full", "a")
        else:
            controller.journal._file = open("/dev/full", "ab")
        answers = [controller.submit(order(f"r{k}", k, stop=("x" * 1000,) * 16, tokens=5))[0] for k in range(8)]
        await ended(*answers)
        assert all(answer.generated == answered(k, 5) for k, answer in enumerate(answers))
        assert sum("cannot be written" in record.message for record in caplog.records) == 1
        assert (controller.journal is None) == (full == "journal")
        world.journal.touch()


@in_a_loop
async def test_a_controller_begins_on_a_full_disk_as_well(toys, monkeypatch, caplog):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(journals, "_locked", lambda path: io.BufferedWriter(Full(path, "ab"), 1 << 20))
    async with toys() as world:
        controller = world.start()
        await world.serving(1)
        [answer] = controller.submit(order("r", 1, tokens=5))
        await ended(answer)
        assert answer.generated == answered(1, 5)
        assert controller.journal is None and "requests will not survive a crash" in caplog.text
        world.journal.touch()


@in_a_loop
async def test_a_model_keeps_the_name_that_it_is_served_by(model_dir, tmp_path):
    model = load_model(model_dir, "mine")
    async with Toys(toy_config(), model, tmp_path) as world:
        controller = world.start()
        await world.serving(1)
        with pytest.raises(UnknownModel, match="no model 'toy' here; served: mine"):
            controller.submit(order("r", 1))
        [answer] = controller.submit(order("r", 1, 20, model="mine"))
        await eventually(lambda: answer.generated)
        world.compact()
        await world.restart()
        [answer] = world.controller.submit(order("r", 1, 20, model="mine"), resume=True)
        await ended(answer)
        assert answer.generated == answered(1, 20) and list(world.controller.models) == ["mine"]


@in_a_loop
async def test_a_brain_that_breaks_ends_a_controller_that_drains(model_dir):
    config = toy_config("serve.shutdown_timeout_s=600.0")
    controller = with_journal(lambda: Controller(config, [load_model(model_dir)], {"i0": "127.0.0.1:1"}), None)
    controller.submit(order("r", 1))  # waits for a worker
    serving = asyncio.create_task(serve(controller, "", None, None))
    await asyncio.sleep(0)  # it listens to signals
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: controller.draining)
    controller.on_event("no event")
    with pytest.raises(AttributeError):
        await asyncio.wait_for(serving, 30)

"""Two sources, two targets that are close to each other: each source sends half of every unit, the targets gather."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blitzjax import config as configs
from blitzjax.engine.convert import write_random
from blitzjax.serve import eventlog
from blitzjax.serve.local import LocalCluster
from blitzjax.commands import PrepareTransfer
from blitzjax.types import MulticastPlan
from rig import PATIENT, POOL, SPEC, Rig, caught, phases, prompts

@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lanes") / "events.jsonl"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[Rig]:
    write_random(directory := log.parent / "tiny", SPEC, seed=3)
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", f"cluster.pool={POOL}", "cluster.threads=1", "cluster.fast_gbps=1600",
        "engine.dtype=float32", "engine.max_model_len=256", "engine.max_num_seqs=8", "engine.max_num_batched_tokens=64",
        "transfer.chunk_bytes=512", "transfer.collective_timeout_s=3.0", *PATIENT,
        f"serve.event_log={log}", f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, directory) as cluster:
        cluster.wait_ready(300)
        rig = Rig(cluster)
        rig.settle(1)
        yield rig


def plans(rig: Rig, log: Path) -> list[MulticastPlan]:
    """The multicasts that were prepared, in order."""
    rig.whole_log()
    commands = [r.item for r in eventlog.read(log) if isinstance(r.item, PrepareTransfer)]
    return list({c.plan.ticket: c.plan for c in commands}.values())


def halves(rig: Rig, log: Path) -> int:
    """Two instances serve, two begin to load. Returns how many plans there were before."""
    rig.only(2)
    before = len(plans(rig, log))
    rig.scale(4, live="zigzag")
    return before


def test_tokens_are_right_while_two_targets_load_by_halves(rig: Rig, log: Path) -> None:
    asked = prompts(24, seed=1)
    alone = [rig.send(p).result().token_ids for p in asked]

    def once() -> bool:
        before = halves(rig, log)
        chooser, sent = random.Random(5), []
        for prompt in asked:
            sent.append(rig.send(prompt))
            time.sleep(chooser.random() * 0.15)
        assert [answer.result().token_ids for answer in sent] == alone
        rig.settle(4)
        assert [rig.send(p).result().token_ids for p in asked] == alone
        plan, *more = plans(rig, log)[before:]
        assert [(c.lane, c.lanes, len(c.instances)) for c in plan.chains] == [(0, 2, 2), (1, 2, 2)]
        assert [ring.instances for ring in plan.rings] == [tuple(c.instances[1] for c in plan.chains)]
        return not more  # a second one if a member got no time for 3 s

    assert caught(once)


@pytest.mark.parametrize("phase", ["serving", "live"])
def test_a_killed_member_of_a_lane_costs_no_request(rig: Rig, log: Path, phase: str) -> None:
    asked = prompts(12, seed=3)
    rig.only(1)
    alone = [rig.send(p).result().token_ids for p in asked]

    def once() -> bool:
        before = halves(rig, log)
        sent = [rig.send(p) for p in asked]
        status = rig.wait(lambda s: any(0 < i.layers_loaded < SPEC.layers for i in s.instances) and phase in phases(s)
                          or phases(s).count("serving") == 4, "half loaded")
        victims = [int(i.id[1:]) for i in status.instances if i.phase == phase] or [rig.index("serving")]
        rig.kill(victims[0])
        assert [answer.result().token_ids for answer in sent] == alone
        rig.settle(4)
        first, *more = plans(rig, log)[before:]
        assert [chain.lanes for chain in first.chains] == [2, 2]
        return bool(more)

    assert caught(once)

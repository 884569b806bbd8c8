"""Mixed instances that drain send their answers to others: they are free before those end, and every token is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import Rig, another, caught, phases
from test_prefill_and_decode import Burst, answers  # noqa: F401


@pytest.fixture(scope="module")
def moving(rig: Rig, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with another(rig, model_dir, tmp_path_factory.mktemp("moving"), 1, drain_by_moving=True) as moving:
        yield moving


def test_an_instance_that_drains_is_free_before_its_answers_end(moving: Rig, answers) -> None:  # noqa: F811
    def once() -> bool:
        moving.only(3)
        result = Burst(moving, answers)
        moving.wait(lambda s: result.over or sum(i.running > 0 for i in s.instances) > 1, "answering")
        told = len(moving.log())
        moving.scale(1)
        moving.wait(lambda s: phases(s).count("idle") == 3, "drained")
        result()
        records = moving.whole_log()[told:]
        assert not any(r.get("command") == "Assign" and r["attempt"] > 1 for r in records), "one ran again"
        moved, freed, ended = ([n for n, r in enumerate(records) if r.get("event") == event]
                               for event in ("KVMigrated", "Drained", "RequestFinished"))
        assert all(records[n]["kv_bytes"] > 0 for n in moved)
        return bool(moved) and freed[0] < ended[-2]  # the last one is of the log's mark

    assert caught(once)

"""A rank's programs: as many as it needs are kept, in the order of their last use."""

from __future__ import annotations

import pytest
from transfer_peers import free_port

from blitzjax.transfer import compat, world as worlds
from blitzjax.transfer.world import World


def test_programs_of_cliques_that_nobody_forms_any_more_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "_MAX_TICKS", 2)
    address = f"127.0.0.1:{free_port()}"
    service = compat.start_coordination_service(address, 1, 100.0)
    world = World(address, 0, 1, "127.0.0.1", 1, 4, 100.0, 100.0)
    try:
        world.join()
        first, second = world.tick([0], 0, 64), world.tick([0], 1, 64)
        assert world.tick([0], 0, 64) is first
        world.tick([0], 2, 64)
        assert world.tick([0], 0, 64) is first and world.tick([0], 1, 64) is not second
        assert len(world._ticks) == 2
    finally:
        world.leave()
        service.shutdown()

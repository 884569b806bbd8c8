"""Hand-off between real processes: the same bits arrive, and nothing waits for ever."""

from __future__ import annotations

import signal
import time

import pytest

from transfer_peers import Peer

SHAPES = [[1], [3, 5], [128, 576], [2, 64, 3, 64]]
TOO_LATE = "nothing came within 1 s"


@pytest.fixture
def pair(lone_peers: list[Peer]) -> list[Peer]:
    return lone_peers


def error_of(peer: Peer, address: str, uuid: int) -> str:
    """What a take that cannot get anything ends with."""
    peer.send("take", address=address, uuid=uuid, shapes=SHAPES, dtype="float32", seed=1, timeout_s=1)
    return peer.answer()["error"]


def succeeds(giver: Peer, taker: Peer, dtype: str = "float32", timeout_s: float = 60) -> bool:
    address, uuid = giver.ask("offer", shapes=SHAPES, dtype=dtype, seed=1)
    taker.send("take", address=address, uuid=uuid, shapes=SHAPES, dtype=dtype, seed=1, timeout_s=timeout_s)
    return taker.answer().get("done", False) is True


def test_round_trip_is_bit_exact_both_ways(pair: list[Peer]) -> None:
    for dtype in ("float32", "bfloat16", "int32"):
        assert succeeds(pair[0], pair[1], dtype)
        assert succeeds(pair[1], pair[0], dtype)


def test_takes_of_what_was_never_offered_or_is_withdrawn_end(pair: list[Peer]) -> None:
    giver, taker = pair
    address, uuid = giver.ask("offer", shapes=SHAPES, dtype="float32", seed=1)
    assert TOO_LATE in error_of(taker, address, 12345)
    assert giver.ask("withdraw", uuid=uuid, timeout_s=60) is True
    assert giver.ask("withdraw", uuid=uuid, timeout_s=60) is False
    assert TOO_LATE in error_of(taker, address, uuid)
    assert succeeds(giver, taker)


def test_takes_from_stopped_and_killed_peers_end(pair: list[Peer]) -> None:
    giver, taker = pair
    address, uuid = giver.ask("offer", shapes=SHAPES, dtype="float32", seed=1)
    giver.process.send_signal(signal.SIGSTOP)
    assert TOO_LATE in error_of(taker, address, uuid)
    giver.process.send_signal(signal.SIGCONT)
    assert succeeds(giver, taker)
    address, uuid = giver.ask("offer", shapes=SHAPES, dtype="float32", seed=1)
    giver.kill()
    assert error_of(taker, address, uuid)
    giver.start()
    assert succeeds(giver, taker)
    assert succeeds(taker, giver)


def test_a_taker_that_dies_in_the_middle_takes_nobody_along(pair: list[Peer]) -> None:
    """What it leaves behind in the giver ends all later takes from there, until another server makes the offers."""
    giver, taker = pair
    many = {"shapes": SHAPES[-1:] * 60, "dtype": "float32", "seed": 1}
    for _ in range(2):
        address, uuid = giver.ask("offer", **many)
        taker.send("take", address=address, uuid=uuid + 1, timeout_s=20, **many)  # the next offer
        time.sleep(0.5)
        taker.process.send_signal(signal.SIGSTOP)
        address, uuid = giver.ask("offer", **many)  # more than the sockets hold
        giver.ask("withdraw", uuid=uuid, timeout_s=1)  # as an instance does that loses its partner
        taker.kill()
        taker.start()
        assert any(succeeds(giver, taker, timeout_s=3) for _ in range(30))
        assert succeeds(taker, giver)

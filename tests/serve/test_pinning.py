"""What computes stays on its core, what communicates does not."""

from __future__ import annotations

import contextlib
import os
import threading

from blitzjax.errors import BlitzError
from blitzjax.serve.node import computing_on


def _cores_of_new_thread() -> set[int]:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_start_inside_are_pinned_and_later_ones_are_not() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    with computing_on(core):
        assert _cores_of_new_thread() == {core}
    assert _cores_of_new_thread() == os.sched_getaffinity(0) == before
    with contextlib.suppress(BlitzError), computing_on(core):
        raise BlitzError("a model that cannot be compiled, say")
    assert os.sched_getaffinity(0) == before


def test_without_a_core_nothing_changes() -> None:
    before = os.sched_getaffinity(0)
    with computing_on(None):
        assert _cores_of_new_thread() == before

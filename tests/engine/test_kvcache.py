"""The decode batch's memory grows and shrinks through sizes that were compiled before."""

from __future__ import annotations

import itertools

import pytest
from test_instance import SPEC, Rig, finished, rigs, work  # noqa: F401

from blitzjax.config import EngineConfig
from blitzjax.engine.shapes import shapes_for

SHAPES = shapes_for(SPEC, EngineConfig(max_model_len=2048, max_num_seqs=16))


def test_every_size_is_reached_from_every_other_by_steps_to_the_next_one() -> None:
    sizes = list(itertools.product(SHAPES.batches, SHAPES.contexts))
    for start, stop in itertools.product(sizes, sizes):
        path = [start, *SHAPES.steps(*start, *stop)]
        assert path[-1] == stop
        for (rows, length), (rows_then, length_then) in itertools.pairwise(path):
            a, b = (abs(options.index(x) - options.index(y)) for options, x, y in (
                (SHAPES.batches, rows, rows_then), (SHAPES.contexts, length, length_then)))
            assert a + b == 1
        assert max(r * c for r, c in path) <= max(start[0], stop[0]) * max(start[1], stop[1])


@pytest.mark.parametrize("lengths", [[(5, 4)] * 3 + [(5, 40)], [(100, 20), (5, 3)], [(5, 60), (100, 3), (5, 30), (5, 3)]])
def test_serving_compiles_nothing(rigs, lengths: list[tuple[int, int]]) -> None:  # noqa: F811
    rig: Rig = rigs["old"]
    rig.load(SPEC.units)
    stages = rig.instance._stages
    stages.compile_all()
    known = set(stages._found)
    works = [work(n, tokens, max_tokens=most, ignore_eos=True) for n, (tokens, most) in enumerate(lengths)]
    for some in (works, works[::-1]):
        rig.events.clear()
        rig.post(*some)
        rig.wait(lambda events: finished(events) >= {w.request.id for w in works}, "answers")
    assert set(stages._found) == known

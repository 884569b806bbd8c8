"""The table of phases, written out once more by hand."""

from __future__ import annotations

import itertools

import pytest

from blitzjax.control import lifecycle
from blitzjax.errors import IllegalMove
from blitzjax.types import Phase

LEGAL = {
    ("idle", "loading"), ("idle", "live"),
    ("loading", "live"), ("loading", "serving"), ("loading", "idle"),
    ("live", "loading"), ("live", "serving"), ("live", "idle"),
    ("serving", "draining"), ("draining", "serving"), ("draining", "idle"),
    ("failed", "idle"), ("failed", "serving"), *((phase.value, "failed") for phase in Phase),
}


@pytest.mark.parametrize(("phase", "to"), list(itertools.product(Phase, Phase)))
def test_only_listed_moves_are_legal(phase: Phase, to: Phase) -> None:
    if (phase.value, to.value) in LEGAL:
        assert lifecycle.move(phase, to) is to
    else:
        with pytest.raises(IllegalMove, match=f"{phase.value} to {to.value}"):
            lifecycle.move(phase, to)

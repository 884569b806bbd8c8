"""What an instance takes on fits beside its model, counted by hand; what cannot fit is said with the knobs that help."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from blitzjax.config import EngineConfig, from_tables
from blitzjax.engine.memory import Needs, Room, common, needs_of, room, room_on
from blitzjax.engine.params import LayerStore
from blitzjax.engine.shapes import Shapes
from blitzjax.engine.stages import Stages
from blitzjax.errors import ConfigError
from blitzjax.types import ModelSpec

SPEC = ModelSpec("tiny", "llama", 5, 64, 4, 2, 16, 128, 272, 512, 10000.0, 1e-5, True, "float32")
SHAPES = Shapes(batches=(2, 4, 8, 16), contexts=(256, 512, 1024), widths=(32, 64), hits=True)
NEEDS = Needs(parameters=50_000, temporaries=5_000, token=10)  # a row: 10,240; beside rows: 50,000 + 10,000 + 81,920
ENGINE = EngineConfig(max_num_seqs=12, max_model_len=1000, page_size=16)


@pytest.mark.parametrize("budget, slots", [
    (141_920 + 16 * 10_240, 12), (141_920 + 16 * 10_240 - 1, 8), (141_920 + 8 * 10_240, 8), (141_920 + 2 * 10_240, 2)])
def test_rows_at_full_length_fit(budget: int, slots: int) -> None:
    """Rows come in powers of two: 12 sequences lie in 16."""
    assert room(ENGINE, SHAPES, NEEDS, budget) == Room(slots, slots * 63)


def test_pages_that_were_asked_for_stay() -> None:
    assert room(EngineConfig(max_num_seqs=12, kv_pages=77), SHAPES, NEEDS, 141_920 + 4 * 10_240) == Room(4, 77)


def test_what_does_not_fit_is_an_error_that_names_the_knobs() -> None:
    with pytest.raises(ConfigError, match=r"50,000 bytes of parameters.*engine\.memory_fraction.*engine\.max_model_len"):
        room(ENGINE, SHAPES, NEEDS, 141_920 + 2 * 10_240 - 1)


def test_a_worker_takes_what_the_largest_of_its_models_leaves() -> None:
    assert common([Room(8, 100), Room(4, 900)], ENGINE) == Room(4, 100)
    assert common([], ENGINE) == Room(12, 12 * 63)


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ConfigError, match="memory_fraction"):
        from_tables({"engine": {"memory_fraction": fraction}})


@pytest.mark.parametrize("tp", [1, 2])
def test_needs_are_those_of_one_device(tmp_path: Path, tp: int) -> None:
    store = LayerStore(SPEC, jax.local_devices()[:tp])
    stages = Stages(SPEC, EngineConfig(dtype="float32", max_num_seqs=3, executable_cache=str(tmp_path)), store.mesh)
    assert stages.temporary_bytes == 0
    stages.blank(2, 256)  # its results are 2 rows of 256 tokens of one layer
    needs = needs_of(stages, store)
    assert needs.token == 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4 // tp
    assert needs.temporaries >= 2 * 256 * needs.token // SPEC.layers
    assert needs.parameters == sum(store.slab(unit, 0).nbytes for unit in range(SPEC.units))
    assert room_on(stages, store, EngineConfig(max_num_seqs=3)) == Room(3, 3 * 128)  # CPUs do not say what they have

"""How many sequences may an instance hold beside its model, so that its device memory suffices at every moment?

Invariant: slots are bounded by the arrays that rows really take, `SlotCache`'s, at their longest; pages, which those
bound loosely, never exceed what the slots hold unless `engine.kv_pages` says so.

    budget      [ parameters | temporaries, twice | staging | slots x longest row ........ ]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blitzjax.config import EngineConfig
from blitzjax.control.blocks import pages_for, pages_of
from blitzjax.engine.params import LayerStore
from blitzjax.engine.prefixes import ROWS_IN_FLIGHT
from blitzjax.engine.shapes import Shapes
from blitzjax.engine.stages import Stages
from blitzjax.errors import ConfigError

# of a prompt that runs, one that comes and one that goes, each with a copy of another length; on their way to the host
_STAGED_ROWS = 6 + ROWS_IN_FLIGHT
_TEMPORARIES = 2  # one execution's are still there when the next is enqueued


@dataclass(frozen=True, slots=True)
class Room:
    """What one instance takes on."""

    slots: int  # sequences
    pages: int  # of KV


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on one device."""

    parameters: int
    temporaries: int  # of the stage that needs most
    token: int  # KV of one token, all layers


def room_on(stages: Stages, store: LayerStore, engine: EngineConfig) -> Room:
    """Of an instance whose stages are compiled. Devices that do not say what memory they have, as CPUs, get what is
    configured. Raises ConfigError.
    """
    stats = stages.mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return Room(engine.max_num_seqs, pages_of(engine))
    return room(engine, stages.shapes, needs_of(stages, store), stats["bytes_limit"])


def needs_of(stages: Stages, store: LayerStore) -> Needs:
    token = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in stages.kv_specs(1, 1))
    return Needs(parameters=sum(store.slab_bytes(unit) for unit in range(store.spec.units)),
                 temporaries=stages.temporary_bytes, token=store.spec.layers * token)


def room(engine: EngineConfig, shapes: Shapes, needs: Needs, budget: int) -> Room:
    """`budget`: bytes that this process may use of each device, `engine.memory_fraction` of it. Raises ConfigError."""
    row = shapes.contexts[-1] * needs.token
    free = budget - needs.parameters - _TEMPORARIES * needs.temporaries - _STAGED_ROWS * row
    fitting = [batch for batch in shapes.batches if batch * row <= free]
    if not fitting:
        raise ConfigError(
            f"{needs.parameters:,} bytes of parameters and {_TEMPORARIES} x {needs.temporaries:,} of temporaries leave no "
            f"room for {shapes.batches[0]} + {_STAGED_ROWS} rows of {row:,} bytes of KV in {budget:,} bytes per device; "
            f"raise engine.memory_fraction ({engine.memory_fraction:g}) or engine.tensor_parallel, or lower "
            f"engine.max_model_len or engine.max_num_batched_tokens")
    slots = min(engine.max_num_seqs, fitting[-1])
    return Room(slots, engine.kv_pages or slots * pages_for(engine.max_model_len, engine.page_size))


def common(rooms: Sequence[Room], engine: EngineConfig) -> Room:
    """What a worker takes on whichever of its models it is an instance of."""
    return Room(min((r.slots for r in rooms), default=engine.max_num_seqs),
                min((r.pages for r in rooms), default=pages_of(engine)))

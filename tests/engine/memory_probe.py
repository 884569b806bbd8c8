"""Run as a process: how many bytes a conversion, or a load without the parameters themselves, adds to peak memory.

    python memory_probe.py convert SOURCE TARGET SMALL_SOURCE
    python memory_probe.py load CHECKPOINT SMALL_CHECKPOINT

The small model goes first and is not counted: it warms the allocator up.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import convert
from blitzjax.engine.params import LayerStore, model_bytes


def peak_bytes() -> int:
    """Of resident memory, mapped files included, since `reset`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def reset() -> int:
    """Resident memory now; peaks count from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def load(checkpoint: Checkpoint) -> LayerStore:
    store = LayerStore(checkpoint.spec, jax.devices()[:1])
    for unit in range(checkpoint.spec.units):
        checkpoint.load_unit(unit, store)
    return store


if __name__ == "__main__":
    jax.device_put(np.zeros(4, ml_dtypes.bfloat16)).block_until_ready()  # the runtime's own memory
    warm, action, source = sys.argv[-1], sys.argv[1], Path(sys.argv[2])
    if action == "convert":
        convert(Path(warm), "m", "bfloat16", Path(sys.argv[3] + "-warm"))
        before = reset()
        convert(source, "m", "bfloat16", Path(sys.argv[3]))
        print(peak_bytes() - before)
    else:
        opened = Checkpoint.open(source)
        small = load(Checkpoint.open(Path(warm)))
        before = reset()
        store = load(opened)
        print(peak_bytes() - before - model_bytes(opened.spec))

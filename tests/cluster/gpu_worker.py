"""A worker that takes every branch of a GPU's, on CPUs: memory of its own, that says how much there is; keys and values in
the layout of cuDNN's attention, whose calls XLA computes. For `Launch.worker`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jaxlib._jax

from blitzjax.config import EngineConfig
from blitzjax.engine import attention, stages
from blitzjax.serve import worker
from blitzjax.serve.hosts import Launch
from blitzjax.transfer import staging
from blitzjax.types import ModelSpec

LAUNCH = Launch(worker=(sys.executable, str(Path(__file__))))
BUDGET_BYTES = 4 << 30


def chosen(spec: ModelSpec, config: EngineConfig, *_: object) -> attention.Attention:
    return attention.fused("xla", spec.dtype)


def main() -> int:
    staging.has_own_memory = lambda device: True
    stages.chosen = chosen
    jaxlib._jax.Device.memory_stats = lambda device: {"bytes_limit": BUDGET_BYTES}
    return worker.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

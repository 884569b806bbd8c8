"""A worker that takes every branch of a GPU's, on CPUs: a default client that is not the CPU's; devices with memory of
their own, that say how much there is; keys and values in the layout of cuDNN's attention, whose calls XLA computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jaxlib._jax
from jax._src import xla_bridge
from jaxlib import xla_client

from blitzjax.config import EngineConfig
from blitzjax.engine import attention, stages
from blitzjax.serve import worker
from blitzjax.serve.hosts import Launch
from blitzjax.transfer import staging
from blitzjax.types import ModelSpec

PLATFORM = "not_the_cpu"
LAUNCH = Launch(worker=(sys.executable, str(Path(__file__))), env={"JAX_PLATFORMS": f"{PLATFORM},cpu"})
BUDGET_BYTES = 4 << 30


def chosen(spec: ModelSpec, config: EngineConfig, *_: object) -> attention.Attention:
    return attention.fused("xla", spec.dtype)


def main() -> int:
    xla_bridge.register_backend_factory(PLATFORM, xla_client.make_cpu_client)
    staging.has_own_memory = lambda device: True
    stages.chosen = chosen
    jaxlib._jax.Device.memory_stats = lambda device: {"bytes_limit": BUDGET_BYTES}
    return worker.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

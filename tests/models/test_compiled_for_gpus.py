"""Programs compile for an H100 on a machine that has none, where jax's CUDA plugin is installed: `pip install "jax[cuda12]"`.

XLA's own description of a GPU that is not there; what it would measure on one, to choose kernels by, it leaves out. Uses
private parts of jax, checked with 0.10.2, to make it believe in that GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bench.roofline import MODELS
from blitzjax.config import EngineConfig
from blitzjax.engine.params import TP_AXIS
from blitzjax.engine.stages import Stages
from blitzjax.models import read_config
from blitzjax.types import ModelSpec
from test_families import CHECKPOINTS
from test_lowered_for_gpus import OF_A_FAMILY

plugin = pytest.importorskip("jax_plugins.xla_cuda12", reason="needs jax's CUDA plugin")
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SMALL = dict(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def gpus() -> list[jax.Device]:
    bridge, kernels = (pytest.importorskip(f"jax._src.{name}") for name in ("xla_bridge", "cudnn.fused_attention_stablehlo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_gpu_autotune_level=0")
        patch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        patch.setitem(bridge._alias_to_platforms, "gpu", ["cuda"])
        patch.setattr(kernels, "check_compute_capability", lambda capability: True)
        plugin.initialize()
        yield topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x2").devices


def stages(spec: ModelSpec, gpus: list[jax.Device], directory: Path, **sizes: int) -> Stages:
    mesh = Mesh(np.array(gpus), (TP_AXIS,), axis_types=(AxisType.Auto,))
    return Stages(spec, EngineConfig(executable_cache=str(directory), **sizes), mesh)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_every_family_compiles(case: str, tp: int, gpus: list[jax.Device], tmp_path: Path) -> None:
    made = stages(read_config(CHECKPOINTS[case]["config"], case, "bfloat16"), gpus[:tp], tmp_path, **SMALL)
    odd = {"softcap", "sinks"} & {name for name, value in made.spec.options if value}  # cuDNN knows neither
    assert made.attention.fused == (None if odd else "cudnn") and made.attention.layout.dtype == "bfloat16"
    for stage in made._all():
        if case == "llama" or stage[0] in OF_A_FAMILY:
            made._stage(*stage)
    assert made.cache.compiled == len(list(tmp_path.glob("*.xla"))) >= 7, "each is kept, so that others can load it"


@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_of_a_large_model_updates_its_cache_in_place(tp: int, gpus: list[jax.Device], tmp_path: Path) -> None:
    """A layer of an 8B model, 16 rows of 2048 tokens: beside its part of the cache a GPU needs megabytes for a step."""
    spec = MODELS["llama-3-8b"]
    made = stages(spec, gpus[:tp], tmp_path)
    stats = made._stage("decode", 0, 1, 16, 2048).memory_analysis()
    cache = sum(2 * np.prod(a.shape) for a in made.kv_specs(16, 2048)) / tp
    assert stats.alias_size_in_bytes == cache and stats.temp_size_in_bytes < cache / 16


def test_the_head_of_a_large_model_gathers_logits_and_no_weights(gpus: list[jax.Device], tmp_path: Path) -> None:
    spec = MODELS["llama-3-8b"]
    stats = stages(spec, gpus, tmp_path)._stage("logits", 16).memory_analysis()
    assert stats.temp_size_in_bytes < 4 * 16 * spec.vocab * 4 < spec.vocab * spec.dim / 8


def test_soft_caps_do_not_turn_the_cache_around(gpus: list[jax.Device], tmp_path: Path) -> None:
    spec = replace(MODELS["llama-3-8b"], options=(("softcap", 50.0),))
    made = stages(spec, gpus[:1], tmp_path)
    stats = made._stage("decode", 0, 1, 16, 2048).memory_analysis()
    assert stats.temp_size_in_bytes < sum(2 * np.prod(a.shape) for a in made.kv_specs(16, 2048)) / 8

"""Every stage of every family is lowered for CUDA here, alone and sharded: nothing that only CPUs have gets into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from blitzjax.config import EngineConfig
from blitzjax.engine.attention import fused
from blitzjax.engine.executables import Program
from blitzjax.engine.params import LayerStore
from blitzjax.engine.stages import Stages
from blitzjax.models import read_config
from test_families import CHECKPOINTS

OF_A_FAMILY = {"embed", "aux", "first", "next", "decode", "head_greedy"}
OF_ALL = {"last_row", "logits", "sample", "edit", "described", "score", "insert", "blank", "resize"}
XLA_EXPANDS = {"mhlo.topk", "Sharding"}  # calls that the compiler knows on every platform
SMALL = dict(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)


class Lowering:
    """Instead of an ExecutableCache: the text of each stage, as CUDA's compiler would get it."""

    def __init__(self, kinds: set[str]) -> None:
        self.texts: dict[str, str] = {}
        self._kinds = kinds

    def get(self, name: str, build: Callable[[], Program]) -> None:
        if name.partition("-")[0] in self._kinds:
            program = build()
            jitted = jax.jit(program.fn, donate_argnums=program.donate, out_shardings=program.out_shardings)
            self.texts[name] = jitted.trace(*program.args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_stages_lower_for_cuda(case: str, tp: int, tmp_path: Path) -> None:
    spec = read_config(CHECKPOINTS[case]["config"], case, "bfloat16")
    mesh = LayerStore(spec, jax.devices()[:tp]).mesh
    stages = Stages(spec, EngineConfig(executable_cache=str(tmp_path), **SMALL), mesh, fused("cudnn", "bfloat16"))
    kinds = OF_A_FAMILY | OF_ALL if case == "llama" else OF_A_FAMILY
    stages.cache = lowering = Lowering(kinds)
    stages.compile_all()
    stages.compile_moves()
    assert {name.partition("-")[0] for name in lowering.texts} == kinds
    calls = {name: set(re.findall(r"custom_call @([\w$.]+)", text)) for name, text in lowering.texts.items()}
    ours = {name: {c for c in found if not c.startswith("__cudnn$fmha")} for name, found in calls.items()}
    assert not set().union(*ours.values()) - XLA_EXPANDS, ours
    attending = {name.partition("-")[0] for name, found in calls.items() if found - ours[name]}
    capped = case in ("gemma2", "gpt_oss")  # cuDNN knows neither soft caps nor sinks
    assert attending == (set() if capped else {"first", "next", "decode"})

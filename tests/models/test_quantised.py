"""Quantised checkpoints as published, converted and served: what transformers computes from what it dequantises."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_quantised
from answering import answer, token_ids, work
from parity import Model, assert_close, residual

from blitzjax.config import EngineConfig
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.params import LayerStore
from blitzjax.engine.runner import Runner
from blitzjax.engine.stages import Stages
from blitzjax.types import Sampling, Span

REFERENCE = Path(__file__).parents[1] / "reference" / "quantised.npz"
ENGINE = EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)


@pytest.mark.parametrize("case", tiny_quantised.CASES)
def test_what_is_published_is_served(case: str, tmp_path: Path) -> None:
    tiny_quantised.write(case, tmp_path / case)
    opened = Checkpoint.open(resolve(str(tmp_path / case), "float32", tmp_path / "cache"))
    store = LayerStore(opened.spec, jax.devices()[:1])
    for unit in range(opened.spec.units):
        opened.load_unit(unit, store)
    with np.load(REFERENCE) as file:
        expected = {name.partition(".")[2]: file[name] for name in file.files if name.startswith(f"{case}.")}
    model = Model(Runner(Stages(opened.spec, ENGINE, store.mesh), store), expected)
    prefill = model.prefill(expected["tokens"])
    model.runner.run_span(prefill, Span(0, opened.spec.layers))
    assert_close(model.logits(jnp.asarray(residual(prefill))), expected["logits"])
    sampling = Sampling(max_tokens=len(expected["greedy"]), ignore_eos=True)
    said = answer(store, model.runner.stages, ENGINE, [work("a", expected["tokens"].tolist(), sampling)])
    assert token_ids(said["a"]) == expected["greedy"].tolist()

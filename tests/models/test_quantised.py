"""Quantised checkpoints as published, converted and served: what transformers computes from what it dequantises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny_quantised
from answering import answer, token_ids, work
from parity import Model, assert_close, residual

from blitzjax.config import EngineConfig
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.params import LayerStore
from blitzjax.engine.runner import Runner
from blitzjax.engine.stages import Stages
from blitzjax.errors import CheckpointError
from blitzjax.models.fp8 import FP8
from blitzjax.types import Sampling, Span

REFERENCE = Path(__file__).parents[1] / "reference"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """As test_families has it: the executables are the same."""
    return EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16,
                        executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))


@pytest.mark.parametrize("case", tiny_quantised.CASES)
def test_what_is_published_is_served(case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny_quantised.write(case, tmp_path / case)
    opened = Checkpoint.open(resolve(str(tmp_path / case), "float32", tmp_path / "cache"))
    store = LayerStore(opened.spec, jax.devices()[:1])
    for unit in range(opened.spec.units):
        opened.load_unit(unit, store)
    with np.load(REFERENCE / "quantised.npz") as file:
        expected = {name.partition(".")[2]: file[name] for name in file.files if name.startswith(f"{case}.")}
    config = engine(tmp_path_factory)
    model = Model(Runner(Stages(opened.spec, config, store.mesh), store), expected)
    prefill = model.prefill(expected["tokens"])
    model.runner.run_span(prefill, Span(0, opened.spec.layers))
    assert_close(model.logits(jnp.asarray(residual(prefill))), expected["logits"])
    sampling = Sampling(max_tokens=len(expected["greedy"]), ignore_eos=True)
    said = answer(store, model.runner.stages, config, [work("a", expected["tokens"].tolist(), sampling)])
    assert token_ids(said["a"]) == expected["greedy"].tolist()


def dequantised(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same checkpoint in float32, number by number."""
    plain = {}
    for name, array in tensors.items():
        if name.endswith("_blocks"):
            table = np.float32([*E2M1, *(-m for m in E2M1)])
            numbers = np.stack([table[array % 16], table[array // 16]], -1).reshape(*array.shape[:-1], 32)
            powers = np.float32(2) ** (tensors[name.replace("_blocks", "_scales")].astype(np.float32) - 127)
            numbers = (numbers * powers[..., None]).reshape(*array.shape[:2], -1)
            plain[name.removesuffix("_blocks")] = np.ascontiguousarray(numbers.swapaxes(1, 2))
        elif array.dtype == tiny_quantised.F8:
            scales = next(tensors[name + s] for s in ("_scale_inv", "_scale") if name + s in tensors).astype(np.float32)
            scales = scales.reshape(1, 1) if scales.size == 1 else scales
            each = np.ones([a // b for a, b in zip(array.shape, scales.shape, strict=True)], np.float32)
            plain[name] = array.astype(np.float32) * np.kron(scales, each)
        elif "_scale" not in name:
            plain[name] = array
    return plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", tiny_quantised.CASES)
def test_it_becomes_what_the_dequantised_checkpoint_becomes(case: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain" / "m").mkdir(parents=True)
    tensors = tiny_quantised.write(case, tmp_path / "packed" / "m")
    config = json.loads((tmp_path / "packed" / "m" / "config.json").read_text())
    (tmp_path / "plain" / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    save_file(dequantised(tensors), tmp_path / "plain" / "m" / "model.safetensors")
    packed, plain = (Checkpoint.open(resolve(str(tmp_path / kind / "m"), dtype, tmp_path / "cache"))
                     for kind in ("packed", "plain"))
    assert packed.path != plain.path and packed.spec == plain.spec
    for ours, theirs in zip(packed.entries, plain.entries, strict=True):
        assert [(e.name, e.dtype, e.shape, e.crc32) for e in ours] == [(e.name, e.dtype, e.shape, e.crc32) for e in theirs]


@pytest.mark.parametrize(("block", "scales"), [((3, 4), (3, 2)), ((1, 0), (8, 1)), ((0, 0), (1,)), ((0, 0), ())])
def test_last_blocks_may_be_smaller(block: tuple[int, int], scales: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 7), np.float32).astype(tiny_quantised.F8)
    factors = rng.standard_normal(scales, np.float32)
    packing, (tall, wide) = FP8(block), (side or size for side, size in zip(block, values.shape, strict=True))
    assert scales in packing.scales_shapes(values.shape)
    whole = factors.reshape(-(-8 // tall), -(-7 // wide))
    wanted = [[np.float32(values[i, j]) * whole[i // tall, j // wide] for j in range(7)] for i in range(8)]
    np.testing.assert_array_equal(packing.dequantize(values, factors, np.dtype(np.float32)), wanted)


@pytest.mark.parametrize(("case", "name", "scales"), [
    ("mxfp4", "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj_scales"),
    ("blocks", "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight_scale_inv"),
    ("rows", "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight_scale")])
def test_what_is_wrong_with_scales_is_said_with_the_rest(case: str, name: str, scales: str, tmp_path: Path) -> None:
    tensors = tiny_quantised.write(case, tmp_path / "m")
    other = scales.replace("layers.1", "layers.2")
    del tensors[scales], tensors["model.norm.weight"]
    tensors[other] = np.concatenate([tensors[other], tensors[other]])
    tensors[scales.replace("layers.1", "layers.0")] = np.zeros(3, np.int8)
    tensors["model.layers.9.weight_scale"] = np.ones(1, np.float32)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        resolve(str(tmp_path / "m"), "float32", tmp_path / "cache")
    right = tensors[scales.replace("layers.1", "layers.2")].shape
    right = (right[0] // 2, *right[1:])
    for text in (f"{scales} is missing (of {name})", f"{other} has shape {tensors[other].shape}, should be {right}",
                 "has dtype I8, supported are", "model.norm.weight is missing (head)",
                 "model.layers.9.weight_scale is unexpected", "5 problems"):
        assert text in str(caught.value)

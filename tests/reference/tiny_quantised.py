"""Tiny checkpoints quantised as published ones are, made of those in families.json; numpy only, for both sides of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import tiny_families
from safetensors.numpy import save_file

FAMILIES = json.loads((Path(__file__).parent / "families.json").read_text())
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def groups(weights: str, activations: str, dynamic: bool) -> dict[str, object]:
    """As llm-compressor writes it."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}, "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": float8 | {"strategy": weights, "dynamic": False},
                            "input_activations": float8 | {"strategy": activations, "dynamic": dynamic}, "output_activations": None}}}


CASES: Mapping[str, tuple[str, dict[str, object]]] = {  # → family, quantization_config
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": [  # gpt-oss-20b's
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}),
    "blocks": ("qwen3", {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",  # Qwen3-8B-FP8's
                         "weight_block_size": [16, 16]}),
    "experts": ("qwen3_moe", {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",  # Qwen3-30B-A3B-FP8's
                              "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", *(
                                  f"model.layers.{layer}.mlp.gate" for layer in range(3))]}),
    "rows": ("llama", groups("channel", "token", dynamic=True)),  # Llama-3.2-1B-Instruct-FP8-dynamic's
    "whole": ("mistral", groups("tensor", "tensor", dynamic=False)),  # Mistral-7B-Instruct-v0.3-FP8's
}


def write(case: str, path: Path) -> dict[str, np.ndarray]:
    """A directory as its authors would publish it. → its tensors"""
    family, packing = CASES[case]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(FAMILIES[family]["config"] | {"quantization_config": packing}))
    tensors = dict(_tensors(case))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return tensors


def _tensors(case: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in FAMILIES[CASES[case][0]]["tensors"].items():
        if case == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            yield from _mxfp4(name, shape)
        elif case != "mxfp4" and name.endswith("proj.weight"):
            yield from _float8(case, name, shape)
        else:
            yield name, tiny_families.values(case, name, tuple(shape)).astype(BF16)


def _mxfp4(name: str, shape: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Experts [E, in, out] in blocks of 32 inputs."""
    experts, inputs, outputs = shape
    blocks, rng = (experts, outputs, inputs // 32, 16), tiny_families.generator("mxfp4", name)
    yield f"{name}_blocks", rng.integers(0, 256, blocks, np.uint8)
    yield f"{name}_scales", rng.integers(120, 125, blocks[:-1], np.uint8)


def _float8(case: str, name: str, shape: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Every number that E4M3 has, but NaN, which is all ones."""
    rng = tiny_families.generator(case, name)
    yield name, (rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7).view(F8)
    tall, wide = {"blocks": (16, 16), "experts": (8, 8), "rows": (1, shape[1]), "whole": shape}[case]
    scales = (1,) if case == "whole" else (shape[0] // tall, shape[1] // wide)
    factors = rng.uniform(0.5, 1.5, scales) * 0.015 * shape[1] ** -0.5
    if case in ("blocks", "experts"):
        yield f"{name}_scale_inv", factors.astype(BF16)
    else:
        yield f"{name}_scale", factors.astype(np.float32)  # of bfloat16 ones, transformers would round the products
    if case == "whole":
        yield f"{name.removesuffix('weight')}input_scale", np.ones(1, BF16)
    if case == "whole" and "k_proj" in name:
        yield f"{name.removesuffix('k_proj.weight')}k_scale", np.ones(1, BF16)

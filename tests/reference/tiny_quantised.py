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
BF16 = np.dtype(ml_dtypes.bfloat16)

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": [  # gpt-oss-20b's
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}

CASES: Mapping[str, tuple[str, dict[str, object]]] = {  # → family, quantization_config
    "mxfp4": ("gpt_oss", MXFP4),
}


def write(case: str, path: Path) -> None:
    """A directory as its authors would publish it."""
    family, packing = CASES[case]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(FAMILIES[family]["config"] | {"quantization_config": packing}))
    save_file(dict(_tensors(case, family)), path / "model.safetensors", {"format": "pt"})


def _tensors(case: str, family: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in FAMILIES[family]["tensors"].items():
        if family == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            yield from _mxfp4(case, name, shape)
        else:
            yield name, tiny_families.values(case, name, tuple(shape)).astype(BF16)


def _mxfp4(case: str, name: str, shape: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Experts [E, in, out] in blocks of 32 inputs."""
    experts, inputs, outputs = shape
    blocks = (experts, outputs, inputs // 32, 16)
    yield f"{name}_blocks", tiny_families.generator(case, f"{name}_blocks").integers(0, 256, blocks, np.uint8)
    yield f"{name}_scales", tiny_families.generator(case, f"{name}_scales").integers(120, 125, blocks[:-1], np.uint8)

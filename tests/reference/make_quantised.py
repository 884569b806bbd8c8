"""Writes quantised.npz: what transformers computes, in float32, from the tiny checkpoints of tiny_quantised.py, whose
weights it dequantises as it loads them. See README.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tiny_quantised
import torch
from make_families import run
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

DEQUANTISED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}


def main() -> None:
    outputs = {}
    for case, (_, packing) in tiny_quantised.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny_quantised.write(case, Path(folder) / "model")
            model = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "model", dtype=torch.float32, attn_implementation="eager",
                quantization_config=DEQUANTISED[str(packing["quant_method"])](dequantize=True))
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            outputs |= {f"{case}.{name}": value for name, value in run(case, model.eval()).items()
                        if name in ("tokens", "logits", "greedy", "steps")}
    np.savez_compressed(Path(__file__).parent / "quantised.npz", **outputs)


if __name__ == "__main__":
    main()

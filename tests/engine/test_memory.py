"""Converting and loading stream: extra memory is that of two layers, however many layers there are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from blitzjax.engine import published
from blitzjax.engine.convert import TINY
from blitzjax.engine.params import model_bytes, unit_bytes
from blitzjax.types import ModelSpec

PROBE = Path(__file__).with_name("memory_probe.py")
SPEC = replace(TINY, layers=24, dim=512, heads=8, kv_heads=4, head_dim=64, ffn_dim=1024, dtype="bfloat16")
SLACK_BYTES = 1 << 20  # the interpreter's and the allocator's own


def write_source(path: Path, spec: ModelSpec) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({
        "model_type": "llama", "num_hidden_layers": spec.layers, "hidden_size": spec.dim, "vocab_size": spec.vocab,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "intermediate_size": spec.ffn_dim,
        "max_position_embeddings": spec.max_len, "rms_norm_eps": spec.norm_eps, "tie_word_embeddings": True}))
    shapes = {n: s for unit in published.wanted(spec, partial(published.names, spec)) for n, s in unit.items()}
    save_file({n: np.zeros(s, ml_dtypes.bfloat16) for n, s in shapes.items()}, path / "model.safetensors")
    return path


def probe(*args: object) -> int:
    done = subprocess.run([sys.executable, PROBE, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux reports them")
def test_converting_and_loading_take_two_layers_of_memory(tmp_path: Path) -> None:
    source, small = write_source(tmp_path / "hf", SPEC), write_source(tmp_path / "small", replace(SPEC, layers=2))
    allowed = 2 * unit_bytes(SPEC, 1) + SLACK_BYTES
    assert allowed < model_bytes(SPEC) / 6  # holding the model, or a third of it, would show
    assert probe("convert", source, tmp_path / "ours", small) < allowed
    assert probe("load", tmp_path / "ours", tmp_path / "ours-warm") < allowed

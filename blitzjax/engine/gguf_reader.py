"""Reads a GGUF file as a ModelSpec and units of float32 arrays, dequantised one unit at a time.

Names and row orders follow llama.cpp's converter (gguf-py/gguf/tensor_mapping.py, convert_hf_to_gguf.py); only the
architectures in `ARCHITECTURES` are read. Invariant: every tensor of the file is used exactly once, or opening fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np

from blitzjax.engine import published
from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec

Scalar: TypeAlias = str | int | float | bool

ARCHITECTURES = {"llama": "llama"}  # general.architecture → our family

_NAMES = {  # published tensor name within its unit → GGUF name, without `blk.N.`
    "model.embed_tokens.weight": "token_embd.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_TYPES = tuple(gguf.GGMLQuantizationType[name] for name in (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))
_PERMUTED = ("attn_q.weight", "attn_k.weight")  # llama.cpp interleaves their rows for its own rope


@dataclass(frozen=True, slots=True)
class GGUF:
    """An opened GGUF file whose tensors are known to fit `spec`."""

    path: Path
    reader: gguf.GGUFReader
    spec: ModelSpec

    @classmethod
    def open(cls, path: Path, name: str, dtype: str) -> GGUF:
        """Raises CheckpointError listing every missing, unexpected or misshapen tensor."""
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as e:
            raise CheckpointError(f"{path} is not a readable GGUF file ({e}); download it again") from e
        opened = cls(path, reader, _read_spec(path, reader, name, dtype))
        opened._check_tensors()
        return opened

    def units(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each unit, in order, as float32."""
        tensors = {t.name: t for t in self.reader.tensors}
        return published.units(self.spec, self._names, lambda name: self._dequantize(tensors[name]))

    def _names(self, unit: int) -> dict[str, str]:
        """Published name → name in this file, for one unit."""
        prefix = f"blk.{unit}." if unit < self.spec.layers else ""
        return {name: prefix + _NAMES[name] for name in published.names(self.spec, unit)}

    def _dequantize(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """Through a mapping of its own: pages of the file leave memory with it."""
        stored = np.memmap(self.path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        array = gguf.quants.dequantize(stored, tensor.tensor_type).reshape(_shape(tensor))
        return _unpermute(array, self.spec.head_dim) if tensor.name.endswith(_PERMUTED) else array

    def _check_tensors(self) -> None:
        problems = [f"{t.name} has type {t.tensor_type.name}, supported are {', '.join(k.name for k in _TYPES)}"
                    for t in self.reader.tensors if t.tensor_type not in _TYPES]
        published.check(self.path, self.spec, published.wanted(self.spec, self._names),
                        {t.name: _shape(t) for t in self.reader.tensors}, problems)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest dimension first


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows x0 y0 x1 y1 ... of each head → x0 x1 ... y0 y1 ... (the inverse of `permute` in convert_hf_to_gguf.py)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _read_spec(path: Path, reader: gguf.GGUFReader, name: str, dtype: str) -> ModelSpec:
    architecture = field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported; "
                              f"supported: {', '.join(ARCHITECTURES)}")
    try:
        return _llama_spec(path, reader, name, dtype)
    except KeyError as e:
        raise CheckpointError(f"{path}: metadata {e} is missing") from e


def _llama_spec(path: Path, reader: gguf.GGUFReader, name: str, dtype: str) -> ModelSpec:
    def get(key: str) -> int | float:
        return reader.fields[f"llama.{key}"].contents()

    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = field(reader, "llama.attention.key_length", dim // heads)
    scaling = field(reader, "llama.rope.scaling.type", "none")
    if scaling != "none" or field(reader, "llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{path}: scaled or partial rope is not supported")
    ends = (field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    begins = field(reader, "tokenizer.ggml.add_bos_token", False)
    return ModelSpec(
        name=name, family=ARCHITECTURES["llama"], layers=get("block_count"), dim=dim, heads=heads,
        kv_heads=field(reader, "llama.attention.head_count_kv", heads), head_dim=head_dim,
        ffn_dim=get("feed_forward_length"), vocab=len(reader.fields["tokenizer.ggml.tokens"].data),
        max_len=get("context_length"), rope_theta=field(reader, "llama.rope.freq_base", 10000.0),
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32: 1e-5 reads 9.99999975e-6
        tied_embeddings=all(t.name != "output.weight" for t in reader.tensors), dtype=dtype,
        eos_token_ids=tuple(sorted({end for end in ends if end is not None})),
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id") if begins else None)


def field(reader: gguf.GGUFReader, key: str, default: Scalar | list[Scalar] | None = None):
    """The value of a metadata key, `default` if the file does not have it."""
    return reader.fields[key].contents() if key in reader.fields else default

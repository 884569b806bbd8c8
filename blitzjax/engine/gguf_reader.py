"""Reads a GGUF file as a ModelSpec and units of float32 arrays, dequantised one unit at a time.

Names, row orders and norms follow llama.cpp's converter (its tensor_mapping.py, convert_hf_to_gguf.py); only the
architectures in `ARCHITECTURES` are read. Invariant: every tensor of the file is used exactly once, or opening fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np

from blitzjax.engine import published
from blitzjax.errors import CheckpointError
from blitzjax.models import read_config
from blitzjax.models.design import design
from blitzjax.types import ModelSpec

Scalar: TypeAlias = str | int | float | bool

ARCHITECTURES = {  # general.architecture → model_type of config.json
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_SETTINGS = {  # metadata key behind the architecture's name → setting of config.json
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta", "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_SCALING = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}  # behind rope.scaling. → rope parameter
_KNOWN = {*_SETTINGS, *(f"rope.scaling.{key}" for key in _SCALING), "rope.dimension_count",
          "attention.sliding_window_pattern", "vocab_size", "attention.value_length", "pooling_type",
          "rope.scaling.finetuned", "tensor_data_layout"}
_NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0}  # of others: 0 and False
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores have a scale of their own
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's, one for each pair of dimensions; not a parameter

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
        if (parts := field(reader, "split.count", 1)) > 1:
            raise CheckpointError(f"{path} is one of {parts} parts of a model; join them: llama-gguf-split --merge FIRST OUT")
        opened = cls(path, reader, _read_spec(path, reader, name, dtype))
        opened._check_tensors()
        return opened

    def units(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each unit, in order, as float32."""
        tensors = {t.name: t for t in self.reader.tensors}
        return published.units(self.spec, self._names, lambda name: self._dequantize(tensors[name]))

    def _names(self, unit: int) -> dict[str, str]:
        """Published name → name in this file, for one unit."""
        table = gguf.get_tensor_name_map(_architecture(self.reader), self.spec.layers)
        return {name: table.get_name(full, try_suffixes=(".weight", ".bias")) or full
                for name, full in published.names(self.spec, unit).items()}

    def _dequantize(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """Through a mapping of its own: pages of the file leave memory with it."""
        stored = np.memmap(self.path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        array = gguf.quants.dequantize(stored, tensor.tensor_type).reshape(_shape(tensor))
        if tensor.name.endswith("norm.weight"):
            return array - np.float32(design(self.spec).norm_offset)  # llama.cpp stores the sum
        permuted = _architecture(self.reader) == gguf.MODEL_ARCH.LLAMA and tensor.name.endswith(_PERMUTED)
        return _unpermute(array, self.spec.head_dim) if permuted else array

    def _check_tensors(self) -> None:
        problems = [f"{t.name} has type {t.tensor_type.name}, supported are {', '.join(k.name for k in _TYPES)}"
                    for t in self.reader.tensors if t.tensor_type not in _TYPES]
        found = {t.name: _shape(t) for t in self.reader.tensors if t.name != _ROPE_FACTORS}
        published.check(self.path, self.spec, published.wanted(self.spec, self._names), found, problems)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest dimension first


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows x0 y0 x1 y1 ... of each head → x0 x1 ... y0 y1 ... (the inverse of `permute` in convert_hf_to_gguf.py)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _architecture(reader: gguf.GGUFReader) -> gguf.MODEL_ARCH:
    name = field(reader, "general.architecture")
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _read_spec(path: Path, reader: gguf.GGUFReader, name: str, dtype: str) -> ModelSpec:
    architecture = field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported; "
                              f"supported: {', '.join(ARCHITECTURES)}")
    try:
        _check_known(reader, architecture)
        spec = read_config(_settings(reader, architecture), name, dtype)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: as {e}") from e
    ends = (field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    spec = replace(spec, eos_token_ids=tuple(sorted({end for end in ends if end is not None})))
    factors = next((t.data for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    if factors is None:
        return spec
    return replace(spec, options=tuple(sorted((*spec.options, ("rope_factors", tuple(factors.tolist()))))))


def _settings(reader: gguf.GGUFReader, architecture: str) -> dict[str, object]:
    """The metadata in the words of config.json."""
    found = {setting: field(reader, f"{architecture}.{key}") for key, setting in _SETTINGS.items()}
    # Stored as float32: 1e-5 reads 9.99999975e-6.
    config = {key: float(f"{value:.6g}") if isinstance(value, float) else value
              for key, value in found.items() if value is not None}
    heads, dim = config.get("num_attention_heads", 1), config.get("hidden_size", 0)
    head_dim = config.setdefault("head_dim", dim // heads)
    if architecture in _LARGEST:
        largest = config.get("num_hidden_layers") == _LARGEST[architecture]
        config["query_pre_attn_scalar"] = dim // heads if largest else head_dim
    if pattern := field(reader, f"{architecture}.attention.sliding_window_pattern"):
        config["layer_types"] = _layer_types(pattern, field(reader, f"{architecture}.block_count", 0))
    config["rope_scaling"] = _scaling(reader, architecture)
    config["partial_rotary_factor"] = field(reader, f"{architecture}.rope.dimension_count", head_dim) / (head_dim or 1)
    return config | {
        "model_type": ARCHITECTURES[architecture], "vocab_size": len(field(reader, "tokenizer.ggml.tokens", [])) or None,
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors)}


def _scaling(reader: gguf.GGUFReader, architecture: str) -> dict[str, Scalar]:
    """The rope parameters; without a type, a factor is a linear one (llama.cpp's llama-model.cpp, load_hparams)."""
    found = {name: field(reader, f"{architecture}.rope.scaling.{key}") for key, name in _SCALING.items()}
    kind = found["rope_type"] or ("linear" if found["factor"] else "none")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    given = {name: value for name, value in found.items() if value is not None}
    return {} if kind == "none" else given | {"rope_type": kind}


def _layer_types(pattern: int | list[bool], count: int) -> list[str]:
    """`pattern`: whether each layer has a window, or n: every n-th has none."""
    windows = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(count)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _check_known(reader: gguf.GGUFReader, architecture: str) -> None:
    for key in reader.fields:
        name, value = key.removeprefix(f"{architecture}."), field(reader, key)
        ignored = name not in _KNOWN and value != _NEUTRAL.get(name, 0)
        by_layer = isinstance(value, list) and name in _SETTINGS
        if name != key and (ignored or by_layer):
            raise CheckpointError(f"the setting {key} = {value!r} is not supported; take the model's .safetensors")


def field(reader: gguf.GGUFReader, key: str, default: Scalar | list[Scalar] | None = None):
    """The value of a metadata key, `default` if the file does not have it."""
    return reader.fields[key].contents() if key in reader.fields else default

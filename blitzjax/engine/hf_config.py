"""config.json of a Hugging Face directory → ModelSpec. Reads what transformers 5 writes (`rope_parameters`) and what came
before it (`rope_theta`, `rope_scaling`).

Invariant: a field that changes the model's numbers and that we do not know is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec

CONFIG, GENERATION = "config.json", "generation_config.json"


def read_spec(path: Path, name: str, dtype: str) -> ModelSpec:
    """The model that directory `path` describes; `dtype` is the parameters' once loaded. Raises CheckpointError."""
    config = read_json(path / CONFIG)
    if config is None:
        raise CheckpointError(f"{path}: {CONFIG} is missing, so the model's sizes are unknown")
    model_type = config.get("model_type")
    if model_type not in _SPECS:
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(_SPECS)}")
    config = {key: value for key, value in config.items() if value is not None}
    generation = read_json(path / GENERATION) or {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    try:
        return _SPECS[model_type](config, {
            "name": name, "dtype": dtype, "bos_token_id": config.get("bos_token_id"),
            "eos_token_ids": tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)})
    except KeyError as e:
        raise CheckpointError(f"{path}: {CONFIG} does not say {e}") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: {CONFIG}: {e}") from e


def read_json(path: Path) -> dict[str, object] | None:
    """None for a file that is not there. Raises CheckpointError for one that is not a JSON object."""
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not isinstance(read, dict):
        raise CheckpointError(f"cannot read {path}: not a JSON object")
    return read


def _llama(config: Mapping[str, object], given: dict[str, object]) -> ModelSpec:
    """Raises KeyError for a missing field, ValueError for a variant that is not built."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type {kind!r} is not supported")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"activation {config['hidden_act']!r} is not supported")
    heads = config["num_attention_heads"]
    return ModelSpec(
        family="llama", layers=config["num_hidden_layers"], dim=config["hidden_size"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads, ffn_dim=config["intermediate_size"],
        vocab=config["vocab_size"], max_len=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=config["rms_norm_eps"], tied_embeddings=config.get("tie_word_embeddings", False), **given)


_SPECS: dict[str, Callable[[Mapping[str, object], dict[str, object]], ModelSpec]] = {"llama": _llama}

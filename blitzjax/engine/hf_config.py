"""The JSON files of a Hugging Face directory; what config.json means, the families know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from blitzjax import models
from blitzjax.errors import CheckpointError
from blitzjax.models.packing import Packing
from blitzjax.types import ModelSpec

CONFIG, GENERATION = "config.json", "generation_config.json"


def read_spec(path: Path, name: str, dtype: str) -> ModelSpec:
    """The model that directory `path` describes; `dtype` is the parameters' once loaded. Raises CheckpointError.

    Text ends with what generation_config.json says, for chat models often end with more tokens than config.json has.
    """
    config = read_json(path / CONFIG)
    if config is None:
        raise CheckpointError(f"{path}: {CONFIG} is missing, so the model's sizes are unknown")
    try:
        spec = models.read_config(config, name, dtype)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    ends = (read_json(path / GENERATION) or {}).get("eos_token_id")
    return spec if ends is None else replace(spec, eos_token_ids=tuple(ends) if isinstance(ends, list) else (ends,))


def read_packing(path: Path) -> Packing | None:
    """How the tensors in directory `path`, whose config.json `read_spec` has read, are quantised, if they are."""
    return models.read_packing(read_json(path / CONFIG) or {})


def read_json(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there. Raises CheckpointError for one that is not a JSON object."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not isinstance(read, dict):
        raise CheckpointError(f"cannot read {path}: not a JSON object")
    return read

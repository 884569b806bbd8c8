"""Flax NNX decoders. Knows nothing of serving; a ModelSpec's family names the file whose `FAMILY` builds it.

A new architecture is one file here plus its name below; the engine only ever calls the functions of `Family`. A family
named `package.module:function` is somebody's own (own.py). Invariant: a family's file, and flax with it, is imported
when that family is asked for; a start that compiles nothing never does.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from blitzjax.errors import CheckpointError
from blitzjax.models import own, packing
from blitzjax.models.config import Config
from blitzjax.models.family import Family
from blitzjax.models.packing import Packing
from blitzjax.types import ModelSpec

FAMILIES = ("gemma", "gemma2", "gemma3", "gpt2", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3",
            "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_MODEL_TYPES = {"gemma3_text": "gemma3", "ministral": "mistral"}  # config.json's, where they are not the family's name
_WITH_IMAGES = ("gemma3", "mistral3")  # model types whose text_config is that of a family here


def family(name: str) -> Family:
    """Raises CheckpointError for a family that no file here builds."""
    return own.load(name)[1] if own.is_reference(name) else _built_in(name)


def read_config(values: Mapping[str, object], name: str, dtype: str) -> ModelSpec:
    """The spec of a published config.json. Raises CheckpointError naming what of it is not supported."""
    read_packing(values)
    values = _decoder(values)
    if "model_type" not in values:
        raise CheckpointError("config.json: model_type is missing")
    model_type = str(values["model_type"])
    return _built_in(_MODEL_TYPES.get(model_type, model_type)).spec(values, name, dtype)


def read_packing(values: Mapping[str, object]) -> Packing | None:
    """How tensors beside a published config.json are quantised, if they are. Raises CheckpointError as `read_config`."""
    return packing.read(Config(_decoder(values)))


def _decoder(values: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of the decoder, also behind a vision tower, which is left out: requests hold no images."""
    if values.get("model_type") not in _WITH_IMAGES:
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: model_type = {values['model_type']!r} has no text_config")
    kept = {key: values[key] for key in ("eos_token_id", "quantization_config") if key in values}
    return text | kept | {"tie_word_embeddings": values.get("tie_word_embeddings", True)}


def _built_in(name: str) -> Family:
    if name not in FAMILIES:
        raise CheckpointError(f"model family {name!r} is not supported; supported: {', '.join(FAMILIES)}; "
                              "README, \"Your own Flax model\", says how to serve another")
    return importlib.import_module(f"blitzjax.models.{name}").FAMILY

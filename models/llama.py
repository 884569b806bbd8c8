"""Llama 1 to 3.2 (arXiv:2407.21783), and SmolLM, Yi and others in its form: what the shared decoder is by default."""

from __future__ import annotations

from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


def options(config: Config) -> dict[str, Option]:
    bias = config.get("attention_bias", False)
    return {"activation": config.activation(), "qkv_bias": bias, "o_bias": bias,
            "mlp_bias": config.get("mlp_bias", False)}


FAMILY = decoder_family("llama", options)

"""Gemma (arXiv:2403.08295): GeGLU, scaled embeddings, norms published as the distance of their scale from 1."""

from __future__ import annotations

from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option

DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}


def options(config: Config) -> dict[str, Option]:
    config.only("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")  # all of them mean the last
    return shared(config) | {"activation": "gelu_tanh"}


def shared(config: Config) -> dict[str, Option]:
    """What Gemma 2 and 3 have too."""
    config.only("use_bidirectional_attention", False)
    bias = config.get("attention_bias", False)
    return {"activation": config.activation("hidden_activation", "gelu_pytorch_tanh"), "norm_offset": 1.0,
            "embed_scale": config.need("hidden_size") ** 0.5, "qkv_bias": bias, "o_bias": bias}


FAMILY = decoder_family("gemma", options, defaults=DEFAULTS)

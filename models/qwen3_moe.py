"""Qwen3-30B-A3B and its kin (arXiv:2505.09388): Qwen3 with 128 small experts."""

from __future__ import annotations

from blitzjax.models import qwen2_moe, qwen3
from blitzjax.models.config import Config, plain, sparse
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


def options(config: Config) -> dict[str, Option]:
    return qwen3.options(config) | qwen2_moe.experts(config)


def layer_kinds(config: Config) -> tuple[str, ...]:
    return sparse(config, plain(config))


FAMILY = decoder_family("qwen3_moe", options, layer_kinds=layer_kinds)

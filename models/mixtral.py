"""Mixtral (arXiv:2401.04088): Mistral whose feed-forwards are eight experts, two for each token."""

from __future__ import annotations

from blitzjax.models import mistral
from blitzjax.models.config import Config, windowed
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"router": "block_sparse_moe.gate.weight",
               "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
               "expert_up": "block_sparse_moe.experts.{}.w3.weight",
               "expert_down": "block_sparse_moe.experts.{}.w2.weight"})
DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5}


def options(config: Config) -> dict[str, Option]:
    return mistral.options(config) | {
        "experts": config.need("num_local_experts"), "experts_per_token": config.need("num_experts_per_tok"),
        "expert_dim": config.need("intermediate_size")}


FAMILY = decoder_family("mixtral", options, layer_kinds=windowed, defaults=DEFAULTS, names_table=NAMES)

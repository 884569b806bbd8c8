"""Qwen1.5-MoE and Qwen2-57B-A14B (arXiv:2407.10671): many small experts beside one that sees every token."""

from __future__ import annotations

from blitzjax.models import qwen2
from blitzjax.models.config import Config, plain, sparse, typed
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


def options(config: Config) -> dict[str, Option]:
    return qwen2.options(config) | experts(config) | {
        "qkv_bias": config.get("qkv_bias", True), "shared_dim": config.need("shared_expert_intermediate_size")}


def experts(config: Config) -> dict[str, Option]:
    """What Qwen3's mixtures have too."""
    return {"experts": config.get("num_experts") or config.need("num_local_experts"),
            "experts_per_token": config.need("num_experts_per_tok"), "expert_dim": config.need("moe_intermediate_size"),
            "renormalize": config.get("norm_topk_prob", False)}


def layer_kinds(config: Config) -> tuple[str, ...]:
    if not config.get("use_sliding_window"):
        return sparse(config, plain(config))
    kinds = typed(config, default=lambda layer: layer % 2 == 0 and layer < config.get("max_window_layers", 28))
    return sparse(config, kinds)


FAMILY = decoder_family("qwen2_moe", options, layer_kinds=layer_kinds, defaults=qwen2.DEFAULTS)

"""gpt-oss (arXiv:2508.10925): attention sinks, every other layer a window of 128, YaRN, experts with clamped SwiGLU."""

from __future__ import annotations

from blitzjax.models import gemma2
from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"router": "mlp.router.weight", "experts_gate_up": "mlp.experts.gate_up_proj",
               "experts_down": "mlp.experts.down_proj"})
DEFAULTS = {"head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0, "num_experts_per_tok": 4,
            "attention_bias": True, "rms_norm_eps": 1e-5, "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}}


def options(config: Config) -> dict[str, Option]:
    config.only("hidden_act", "silu")
    config.only("swiglu_limit", 7.0)
    config.only("swiglu_alpha", 1.702)
    bias = config.get("attention_bias")
    return {"activation": "clamped_swiglu", "sinks": True, "window": config.need("sliding_window"), "qkv_bias": bias,
            "o_bias": bias, "experts": config.need("num_local_experts"),
            "experts_per_token": config.get("num_experts_per_tok"), "expert_dim": config.need("intermediate_size"),
            "expert_bias": True}


FAMILY = decoder_family("gpt_oss", options, layer_kinds=gemma2.layer_kinds, defaults=DEFAULTS, names_table=NAMES)

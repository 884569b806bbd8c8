"""GPT-2 (Radford et al., 2019): LayerNorm, learned positions, biases everywhere, matrices published [in, out]."""

from __future__ import annotations

from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"embed": "transformer.wte.weight", "positions": "transformer.wpe.weight",
               "norm": "transformer.ln_f.weight", "attn_norm": "ln_1.weight", "qkv": "attn.c_attn.weight",
               "o": "attn.c_proj.weight", "ffn_norm": "ln_2.weight", "up": "mlp.c_fc.weight",
               "down": "mlp.c_proj.weight"}, layer_prefix="transformer.h.{}.", in_out=True)
DEFAULTS = {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def options(config: Config) -> dict[str, Option]:
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    return {"activation": config.activation(), "layer_norm": True, "gated": False, "learned_positions": True,
            "qkv_bias": True, "o_bias": True, "mlp_bias": True}


FAMILY = decoder_family("gpt2", options, defaults=DEFAULTS, names_table=NAMES)

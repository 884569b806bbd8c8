"""A random two-layer llama under its published tensor names; numpy only, so that both sides of a test can import it."""

from __future__ import annotations

import numpy as np

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 2, 64, 4, 2, 16, 128, 272
ROPE_THETA, NORM_EPS = 10000.0, 1e-5


def weights(seed: int = 7) -> dict[str, np.ndarray]:
    """Untied, with norms away from 1, so that leaving any tensor out shows."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return rng.standard_normal((rows, cols), np.float32) * np.float32(cols ** -0.5)

    def norm() -> np.ndarray:
        return 1 + np.float32(0.3) * rng.standard_normal(DIM, np.float32)

    named = {"model.embed_tokens.weight": matrix(VOCAB, DIM)}
    for layer in range(LAYERS):
        named |= {f"model.layers.{layer}.{name}": value for name, value in {
            "input_layernorm.weight": norm(),
            "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, DIM),
            "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, DIM),
            "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, DIM),
            "self_attn.o_proj.weight": matrix(DIM, HEADS * HEAD_DIM),
            "post_attention_layernorm.weight": norm(),
            "mlp.gate_proj.weight": matrix(FFN, DIM),
            "mlp.up_proj.weight": matrix(FFN, DIM),
            "mlp.down_proj.weight": matrix(DIM, FFN),
        }.items()}
    return named | {"model.norm.weight": norm(), "lm_head.weight": matrix(VOCAB, DIM)}

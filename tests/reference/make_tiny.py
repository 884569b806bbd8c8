"""Writes tiny.npz: what transformers computes from the weights of tiny_llama.py. See README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_llama as tiny


def main() -> None:
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.DIM, intermediate_size=tiny.FFN, num_hidden_layers=tiny.LAYERS,
        num_attention_heads=tiny.HEADS, num_key_value_heads=tiny.KV_HEADS, head_dim=tiny.HEAD_DIM,
        rms_norm_eps=tiny.NORM_EPS, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": tiny.ROPE_THETA})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tiny.weights().items()}, strict=True)
    tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 24))
    layer_outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: layer_outputs.append(output if torch.is_tensor(output) else output[0]))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits
        embedded = model.model.embed_tokens(torch.from_numpy(tokens))
    np.savez_compressed(Path(__file__).with_name("tiny.npz"), tokens=tokens.astype(np.int32), embed=embedded.numpy(),
                        layer_0=layer_outputs[0].numpy(), layers=layer_outputs[-1].numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()

"""Writes families.json and families.npz: a tiny checkpoint per family as transformers saves and runs it. See README.md.

The json holds each checkpoint's config.json with the names and shapes of its tensors; their values are drawn from the
names (tiny_families.py). The npz holds what transformers computes from it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import tiny_families
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

PROMPT_TOKENS, DECODE_STEPS = 27, 16

SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
WINDOW = {"sliding_window": 7}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES = {  # case → (model type, what its config has besides SIZES)
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "mistral": ("mistral", WIDE | WINDOW),
    "qwen2": ("qwen2", WINDOW | {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", WIDE | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", WINDOW | LAYERS | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
                                            "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", WINDOW | LAYERS | {"query_pre_attn_scalar": 24, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "phi3": ("phi3", WINDOW | {"head_dim": 8, "original_max_position_embeddings": 64, "pad_token_id": 0,
                               "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.0, 4.0]}}),
    "phi3_long": ("phi3", {"head_dim": 8, "original_max_position_embeddings": 16, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}}),  # the prompt is beyond 16 tokens
    "olmo2": ("olmo2", {"head_dim": 8}),
    "granite": ("granite", {"head_dim": 8, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                            "residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "gpt2": ("gpt2", {"intermediate_size": None, "num_key_value_heads": None, "head_dim": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", MOE | {"head_dim": 8, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts_per_tok": 3, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", WIDE | WINDOW | LAYERS | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                                     "intermediate_size": 64, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 32}}),
}


def main() -> None:
    here, checkpoints, outputs = Path(__file__).parent, {}, {}
    for case, (model_type, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors = write_checkpoint(case, AutoConfig.for_model(model_type, **given(settings)), Path(folder))
            config = json.loads((Path(folder) / "config.json").read_text())
            checkpoints[case] = {"config": config, "tensors": tensors}
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            outputs |= {f"{case}.{name}": value for name, value in run(case, model.eval()).items()}
    outputs |= {f"mxfp4.{name}": value for name, value in mxfp4().items()}
    (here / "families.json").write_text(json.dumps(checkpoints, indent=None, separators=(",", ":")) + "\n")
    np.savez_compressed(here / "families.npz", **outputs)


def given(settings: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in (SIZES | settings).items() if value is not None}


def write_checkpoint(case: str, config: AutoConfig, folder: Path) -> dict[str, list[int]]:
    """Saves a model of `config`, then replaces its values. → the names and shapes that transformers wrote."""
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    drawn = {name: tiny_families.values(case, name, tuple(shape)) for name, shape in shapes.items()}
    save_file({name: torch.from_numpy(value) for name, value in drawn.items()}, folder / "model.safetensors",
              {"format": "pt"})
    return shapes


def mxfp4() -> dict[str, np.ndarray]:
    """Random blocks of gpt-oss's quantised experts [E, out, n, 16], and the weights [E, in, out] behind them."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 4, 3, 16), np.uint8)
    scales = rng.integers(120, 130, (2, 4, 3)).astype(np.uint8)
    weights = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    return {"blocks": blocks, "scales": scales, "weights": weights.numpy()}


@torch.no_grad()
def run(case: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Residual after the embedding, the first and the last layer; logits of the prompt and of every greedy step."""
    decoder = model.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    seen: list[np.ndarray] = []
    hooks = [layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).numpy()), with_kwargs=True)]
    hooks += [layer.register_forward_hook(
        lambda _, args, out: seen.append((out if torch.is_tensor(out) else out[0]).numpy())) for layer in layers]
    tokens = np.random.default_rng(len(case)).integers(0, model.config.vocab_size, (1, PROMPT_TOKENS))
    out = model(torch.from_numpy(tokens), use_cache=True)
    for hook in hooks:
        hook.remove()
    steps, greedy = [], []
    for _ in range(DECODE_STEPS):
        greedy.append(int((steps[-1] if steps else out.logits[0, -1].numpy()).argmax()))
        out_step = model(torch.tensor([greedy[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        steps.append(out_step.logits[0, -1].numpy())
    return {"tokens": tokens[0].astype(np.int32), "embed": seen[0][0], "layer_0": seen[1][0], "layers": seen[-1][0],
            "logits": out.logits[0].numpy(), "greedy": np.asarray(greedy, np.int32), "steps": np.stack(steps)}


if __name__ == "__main__":
    main()

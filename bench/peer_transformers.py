"""Runs where torch and transformers are, which need not be our environment: `peer_transformers.py < ORDER`, one JSON object.

The order has a model's "config" as its config.json would, "batches", "context" and "prompt" tokens, "steps". Random
weights in bfloat16, the GPU if there is one. Answers {"device": ..., "decode": {batch: seconds a step}, "prefill": seconds}.
"""

import json
import statistics
import sys
import time

import torch
import transformers


def main() -> None:
    order, device = json.load(sys.stdin), "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.for_model(**order["config"])
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        decode = {batch: _decode(model, batch, order["context"], order["steps"]) for batch in order["batches"]}
        tokens = torch.randint(0, config.vocab_size, (1, order["prompt"]), device=device)
        prefill = statistics.median(_timed(lambda: model(tokens, logits_to_keep=1)) for _ in range(order["steps"]))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps({"device": name, "decode": decode, "prefill": prefill, "torch": torch.__version__,
                      "transformers": transformers.__version__}))


def _decode(model: torch.nn.Module, batch: int, context: int, steps: int) -> float:
    """Median seconds of a greedy step with `context` tokens in the cache at first, its own kind of cache."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    out = model(tokens, use_cache=True, logits_to_keep=1)
    cache, token, seen = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    for _ in range(steps + 1):
        def step() -> None:
            nonlocal token
            token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            token.tolist()

        seen.append(_timed(step))
    return statistics.median(seen[1:])


def _timed(call) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

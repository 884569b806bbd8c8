"""Runs in an environment with transformers: `peer_hugging_face.py MODEL.gguf DIRECTORY` writes a Hugging Face checkpoint.

Written by transformers from the GGUF that the other peers read, in bfloat16. It refuses to save a model that it read
from a GGUF, so a plain one of the same configuration takes the weights.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    read = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    kept = {k: v for k, v in model.config.to_dict().items()
            if k not in ("quantization_config", "dtype", "architectures")}
    plain = LlamaForCausalLM(LlamaConfig(**kept))
    plain.load_state_dict(model.state_dict())
    part = target.with_suffix(".part")
    plain.to(torch.bfloat16).save_pretrained(part)
    AutoTokenizer.from_pretrained(**read).save_pretrained(part)
    part.rename(target)


if __name__ == "__main__":
    main()

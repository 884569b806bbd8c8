"""Runs in OpenVINO GenAI's own environment: `peer_openvino.py MODEL.gguf SLOTS`, see peer_servers.OpenVino.

Reads lines {"prompts": [[token, ...], ...], "max_tokens": n}; answers {"tokens": [how many, ...]} when all are done.
"""

import json
import sys

import numpy as np
import openvino
import openvino_genai as genai


def main() -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = int(sys.argv[2])
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", {}, {})
    for line in sys.stdin:
        order = json.loads(line)
        config = genai.GenerationConfig()
        config.max_new_tokens = order["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        batch = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in order["prompts"]]
        results = pipeline.generate(batch, [config] * len(batch))
        print(json.dumps({"tokens": [len(result.m_generation_ids[0]) for result in results]}), flush=True)


if __name__ == "__main__":
    main()

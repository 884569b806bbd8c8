"""How much sooner is the first token of a prompt whose beginning the prefix cache has, and what does looking cost?

One instance on one core, over gRPC, SmolLM2-135M. Pairs of prompts share their first tokens and end differently: the
first of a pair is run whole, the second behind the hit. Between them the same prompts go to an instance without a
prefix cache, which says what the cache costs when it has nothing. Medians; last line: one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import figures, fleet, prompts
from bench.result import say
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.client import Client
from blitzjax.serve.model import load_model

_MODEL = "smollm2-135m"
_SHARED, _OWN = 512, 32  # tokens
_MAX_TOKENS = 16
_SEED = 70


def measure(rounds: int) -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    encode = load_model(directory).tokenizer.encode
    shared = prompts.of_lengths(encode, [_SHARED] * (rounds + 1), _SEED)
    own = [prompts.of_lengths(encode, [_OWN] * 2, _SEED + 1 + k) for k in range(rounds + 1)]
    seen = {}
    for caching in (True, False):
        tables = {"engine": {"max_model_len": 1024, "prefix_caching": caching}}
        with fleet.fleet(directory, 1, None, tables) as made, Client(made.address) as client:
            rows = [_pair(client, prefix, ends) for prefix, ends in zip(shared, own, strict=True)][1:]  # the first warms up
        seen[caching] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"  prefix_caching={caching}: first token after {seen[caching]['whole_s'] * 1e3:.1f} ms, of the second prompt "
              f"after {seen[caching]['again_s'] * 1e3:.1f} ms ({seen[caching]['cached']:g} tokens cached)", flush=True)
    return {"ttft_hit_ratio": figures.rounded(seen[True]["again_s"] / seen[True]["whole_s"]),
            "ttft_miss_ratio": figures.rounded(seen[True]["whole_s"] / seen[False]["whole_s"]),
            "cached_tokens": seen[True]["cached"], "prompt_tokens": _SHARED + _OWN, "rounds": rounds,
            "ttft_s": {str(caching): row for caching, row in seen.items()}}


def _pair(client: Client, prefix: prompts.Tokens, ends: Sequence[prompts.Tokens]) -> dict[str, float]:
    whole, again = [client.generate(prefix + end, max_tokens=_MAX_TOKENS, ignore_eos=True) for end in ends]
    return {"whole_s": whole.usage.ttft_s, "again_s": again.usage.ttft_s, "cached": again.usage.cached_tokens}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix_hits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    say("prefix_hits", measure(2 if args.quick else args.rounds), argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

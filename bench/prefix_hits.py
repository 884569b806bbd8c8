"""How much sooner is the first token of a prompt whose beginning the prefix cache has, and what does looking cost?

Two instances, with and without a prefix cache, over gRPC, SmolLM2-135M, on the same core in turns. Pairs of prompts
share their first tokens and end differently: the first of a pair finds nothing and is kept, the second is run behind
the hit. Every pair goes to both instances; who begins alternates. What a miss costs is the ratio of the workers' CPU
times for the first prompts, from the request to a moment after its end. Medians over pairs; last line: one JSON object.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import figures, fleet, prompts
from bench.result import of_rounds
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.client import Client

_MODEL = "smollm2-135m"
_SHARED, _OWN = 512, 32  # tokens
_MAX_TOKENS = 16
_AFTER_S = 0.1  # pages are kept after the last token is out
_SEED = 70


def measure(rounds: int) -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    encode = prompts.encoder(directory)
    shared = prompts.of_lengths(encode, [_SHARED] * (rounds + 1), _SEED)
    own = [prompts.of_lengths(encode, [_OWN] * 2, _SEED + 1 + k) for k in range(rounds + 1)]
    rows: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        sides = {name: _Side(stack, directory, name == "cache") for name in ("cache", "plain")}
        for k, (prefix, ends) in enumerate(zip(shared, own, strict=True)):
            row: dict[str, float] = {}
            for name in sorted(sides, reverse=k % 2 == 1):
                for which, end in zip(("first", "second"), ends, strict=True):
                    row |= {f"{name}_{which}_{key}": value for key, value in sides[name].ask(prefix + end).items()}
            for key in ("ttft", "cpu"):
                row[f"miss_{key}_ratio"] = row[f"cache_first_{key}_s"] / row[f"plain_first_{key}_s"]
                row[f"hit_{key}_ratio"] = row[f"cache_second_{key}_s"] / row[f"plain_second_{key}_s"]
            rows.append(row)
            print("  pair {}: a miss takes {miss_cpu_ratio:.3f} x the CPU time without a cache, its first token "
                  "{miss_ttft_ratio:.3f} x the time; a hit {hit_cpu_ratio:.3f} and {hit_ttft_ratio:.3f}"
                  .format(k, **row), flush=True)
    return {**figures.median_of(rows[1:]), "prompt_tokens": _SHARED + _OWN, "answer_tokens": _MAX_TOKENS,
            "rounds": rounds}


class _Side:
    """One instance and its client."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, caching: bool):
        tables = {"engine": {"max_model_len": 1024, "prefix_caching": caching}}
        made = stack.enter_context(fleet.fleet(directory, 1, None, tables))
        self._pid = made.cluster.worker_pid(0)
        self._client = stack.enter_context(Client(made.address))

    def ask(self, prompt: prompts.Tokens) -> dict[str, float]:
        before = figures.cpu_s(self._pid)
        result = self._client.generate(prompt, max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True)
        time.sleep(_AFTER_S)
        return {"ttft_s": result.usage.ttft_s, "cpu_s": figures.cpu_s(self._pid) - before,
                "cached": result.usage.cached_tokens}


def main(argv: Sequence[str] | None = None) -> int:
    return of_rounds("prefix_hits", __doc__, measure, 9, argv)


if __name__ == "__main__":
    sys.exit(main())

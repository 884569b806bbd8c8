"""How much memory does a worker process need at most, against what it is there for: parameters and KV?

Peak resident memory (VmHWM) of two workers of a cluster with a warm executable cache: one that loaded the model from
disk, and one that got it by multicast. Each has had 16 answers at once, 128 tokens in, 64 out. SmolLM2-135M in
bfloat16, default settings. The goal: at most 2.5 x the parameters + KV + 400 MiB. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import figures, fleet, prompts
from bench.result import say
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.model import load_model

_MODEL = "smollm2-135m"
_STREAMS, _PROMPT, _ANSWER = 16, 128, 64  # the streams of one worker; tokens
_CONTEXT = 256  # tokens that a row has room for
_KV_ITEM_BYTES = 2  # bfloat16
_SEED = 80
_TIMES, _MORE_BYTES = 2.5, 400 << 20  # the goal


_TABLES = {"engine": {"prefix_caching": True}}  # as a cluster is by default


def measure() -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    model = load_model(directory)
    asked = prompts.of_lengths(prompts.encoder(directory), [_PROMPT] * 2 * _STREAMS, _SEED)
    with fleet.fleet(directory, 1, None, _TABLES):  # everything is compiled, whatever is measured afterwards
        pass
    spec = model.spec
    kv = 2 * spec.layers * spec.kv_heads * spec.head_dim * _CONTEXT * _STREAMS * _KV_ITEM_BYTES
    goal = _TIMES * model.bytes + kv + _MORE_BYTES
    with fleet.fleet(directory, 2, None, _TABLES) as made:
        order, running = asyncio.run(_exercise(made, asked))
        rows = {}
        for name, instance in zip(("from_disk", "from_multicast"), order, strict=True):
            status = Path(f"/proc/{made.cluster.worker_pid(int(instance.removeprefix('i')))}/status").read_text()
            sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", status))
            peak, anonymous, mapped = (int(sizes[key]) * 1024 for key in ("VmHWM", "RssAnon", "RssFile"))
            rows[name] = {"peak_mb": peak / 1e6, "of_goal": peak / goal, "anonymous_mb": anonymous / 1e6,
                          "mapped_mb": mapped / 1e6, "running": running[instance]}
            print(f"  {name:15}" + "".join(f"  {key} {value:.4g}" for key, value in rows[name].items()), flush=True)
    return {**{name: figures.rounded_row(row) for name, row in rows.items()}, "goal_mb": figures.rounded(goal / 1e6),
            "weights_mb": figures.rounded(model.bytes / 1e6), "kv_mb": figures.rounded(kv / 1e6),
            "holds": all(row["of_goal"] <= 1 for row in rows.values())}


async def _exercise(made: fleet.Fleet, asked: Sequence[prompts.Tokens]) -> tuple[list[str], dict[str, int]]:
    """→ who loaded from disk and who from the other one; the most requests that each decoded at once."""
    async with AsyncClient(made.address) as client, fleet.watching(made.address) as watch:
        serving = [i.id for i in (await client.status()).instances if i.phase == "serving"]
        await client.scale(2, source="multicast", wait=True, timeout_s=60)
        answers = await asyncio.gather(*(fleet.ask(client, prompt, _ANSWER) for prompt in asked))
        failed = [answer.error for answer in answers if answer.result is None]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed, one of them with: {failed[0]}")
        running = {i.id: max(j.running for sight in watch.sights for j in sight.status.instances if j.id == i.id)
                   for i in watch.sights[-1].status.instances}
    return serving + sorted(running.keys() - set(serving)), running


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same: it takes half a minute")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    say("memory", measure(), argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

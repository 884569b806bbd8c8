"""What does it cost to stream tokens, and what to draw them by temperature?

16 answers of SmolLM2-135M at once by one instance on all cores, which it shares with controller, gateway and client: by a
Generate each, by one Relay (AsyncClient), and over HTTP, greedily and by temperature 1, which is OpenAI's default; by Relay
also with top-p, and with top-k and top-p. Each round has all eight, in turns; CPU times are the processes' own. Medians
over rounds; last line: one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import aiohttp
import grpc

from bench import figures, fleet, prompts
from bench.result import of_rounds
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.asking import Options, generate_request
from blitzjax.serve.client import AsyncClient
from blitzjax.v1 import inference_pb2_grpc as rpc

_MODEL = "smollm2-135m"
_STREAMS, _PROMPT, _ANSWER = 16, 32, 128  # tokens
_SEED = 90
_KINDS: dict[str, Options] = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0}}
_FILTERED: dict[str, Options] = {"top_p": {"temperature": 1.0, "top_p": 0.95},
                                 "top_k_top_p": {"temperature": 1.0, "top_k": 64, "top_p": 0.95}}


def measure(rounds: int) -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    texts = prompts.of_lengths(prompts.encoder(directory), [_PROMPT] * _STREAMS, _SEED)
    tables = {"engine": {"max_model_len": 256, "max_num_seqs": _STREAMS, "prefix_caching": False}}
    with fleet.fleet(directory, 1, None, tables) as made, _gateway(made.address) as (url, gateway):
        pids = {"controller": made.cluster.controller_pid(), "gateway": gateway}
        rows = asyncio.run(_rounds(rounds, made.address, url, pids, texts))
    return {**figures.median_of(rows), "streams": _STREAMS, "answer_tokens": _ANSWER, "rounds": rounds}


async def _rounds(rounds: int, address: str, url: str, pids: dict[str, int | None],
                  texts: Sequence[prompts.Tokens]) -> list[dict[str, float]]:
    ways = {"generate": (address, _generates, _KINDS), "relay": (address, _relay, {**_KINDS, **_FILTERED}),
            "http": (url, _over_http, _KINDS)}
    rows: list[dict[str, float]] = []
    for k in range(rounds + 1):  # the first warms up
        row: dict[str, float] = {}
        for way, (where, ask, kinds) in ways.items():
            for kind, drawing in kinds.items():
                before, began = {name: figures.cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
                tokens = await ask(where, texts, drawing)
                assert tokens == _STREAMS * _ANSWER, f"{tokens} tokens came over {way}"
                row[f"{way}_{kind}_tokens_per_s"] = tokens / (time.monotonic() - began)
                for name, pid in pids.items():
                    row[f"{way}_{kind}_{name}_us"] = (figures.cpu_s(pid) - before[name]) / tokens * 1e6
                if kind != "greedy":
                    row[f"{way}_{kind}_to_greedy"] = row[f"{way}_{kind}_tokens_per_s"] / row[f"{way}_greedy_tokens_per_s"]
        for way in ("relay", "http"):
            row[f"{way}_to_generate"] = row[f"{way}_drawn_tokens_per_s"] / row["generate_drawn_tokens_per_s"]
        rows.append(row)
        print("  round {}: tokens/s, greedy and drawn: Generate {generate_greedy_tokens_per_s:.0f} "
              "{generate_drawn_tokens_per_s:.0f}, Relay {relay_greedy_tokens_per_s:.0f} {relay_drawn_tokens_per_s:.0f} "
              "(top-p {relay_top_p_tokens_per_s:.0f}, top-k and top-p {relay_top_k_top_p_tokens_per_s:.0f}), "
              "HTTP {http_greedy_tokens_per_s:.0f} {http_drawn_tokens_per_s:.0f}".format(k, **row), flush=True)
    return rows[1:]


@contextlib.contextmanager
def _gateway(address: str) -> Iterator[tuple[str, int]]:
    """→ its URL and process id."""
    process = subprocess.Popen([sys.executable, "-m", "blitzjax.serve.gateway", "--address", address, "--port", "0"],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.wait()


def _options(drawing: Options, index: int) -> Options:
    return {"max_tokens": _ANSWER, "ignore_eos": True, "seed": _SEED + index, **drawing}


async def _generates(address: str, texts: Sequence[prompts.Tokens], drawing: Options) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.InferenceStub(channel)

        async def one(index: int, text: prompts.Tokens) -> int:
            return sum([len(m.token_ids) async for m in stub.Generate(generate_request(text, _options(drawing, index)))])

        return await _all(one, texts)


async def _relay(address: str, texts: Sequence[prompts.Tokens], drawing: Options) -> int:
    async with AsyncClient(address) as client:

        async def one(index: int, text: prompts.Tokens) -> int:
            return len((await client.generate(text, **_options(drawing, index))).token_ids)

        return await _all(one, texts)


async def _over_http(url: str, texts: Sequence[prompts.Tokens], drawing: Options) -> int:
    async with aiohttp.ClientSession() as session:

        async def one(index: int, text: prompts.Tokens) -> int:
            usage: dict[str, int] = {}
            body = {"prompt": text, "stream": True, "stream_options": {"include_usage": True}, **_options(drawing, index)}
            async with session.post(f"{url}/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        usage = json.loads(line[6:]).get("usage") or usage
            return usage["completion_tokens"]

        return await _all(one, texts)


async def _all(one: Callable[[int, prompts.Tokens], Awaitable[int]], texts: Sequence[prompts.Tokens]) -> int:
    return sum(await asyncio.gather(*(one(index, text) for index, text in enumerate(texts))))


def main(argv: Sequence[str] | None = None) -> int:
    return of_rounds("streams", __doc__, measure, 5, argv)


if __name__ == "__main__":
    sys.exit(main())

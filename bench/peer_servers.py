"""The peers of bench.peers: how each is installed, started, and asked. Their weights are our checkpoint's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import blitzjax
from bench import fleet
from bench.peer import CONTEXT, SLOTS, Answer, Peer, Tokens, environment
from bench.peer_files import as_gguf
from bench.peer_http import LlamaCpp, Transformers, Vllm
from blitzjax.serve.client import AsyncClient

_OPENVINO = "openvino-genai==2026.4.1"


class Blitzjax(Peer):
    """Everything between client and tokens: gRPC, the controller, workers."""

    version = blitzjax.__version__

    def __init__(self, checkpoint: Path, directory: Path, instances: int) -> None:
        super().__init__(checkpoint, directory)
        self._instances = instances

    def install(self) -> None:
        """It is what runs this."""

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        pinned = self._instances > 1
        tables = {"engine": {"max_model_len": CONTEXT, "max_num_seqs": SLOTS},
                  "scale": {"min_instances": self._instances, "max_instances": self._instances},
                  "cluster": {"pool": self._instances, "pin_cores": pinned, "threads": 1 if pinned else 0}}
        with fleet.fleet(self.checkpoint, self._instances, None, tables) as made:
            self._root = os.getpid()
            async with AsyncClient(made.address) as self._client:
                await fleet.settle(self._client, self._instances)
                yield

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        answers = await asyncio.gather(*(fleet.ask(self._client, prompt, max_tokens) for prompt in asked))
        return [Answer(a.sent_s, a.first_token_s, a.sent_s + a.whole.total_s, len(a.tokens)) for a in answers]


class OpenVino(Peer):
    """In process: a small program of its own environment that reads batches of prompts and says what it took."""

    version = _OPENVINO

    @property
    def _python(self) -> Path:
        return self.directory / "openvino" / "bin" / "python"

    def install(self) -> None:
        environment(self._python.parent.parent, _OPENVINO, "numpy")
        as_gguf(self.directory / "smollm2-135m.f16.gguf", "float16")  # it refuses bfloat16 files, and computes in it

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        program = Path(__file__).with_name("peer_openvino.py")
        self._process = await asyncio.create_subprocess_exec(
            self._python, program, self.directory / "smollm2-135m.f16.gguf", str(SLOTS),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._root = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._orders, self._answers = self._process.stdin, self._process.stdout
        try:
            yield
        finally:
            self._orders.close()
            await self._process.wait()

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        sent = time.monotonic()
        order = json.dumps({"prompts": [list(p) for p in asked], "max_tokens": max_tokens})
        self._orders.write(order.encode() + b"\n")
        async for line in self._answers:
            if line.startswith(b"{"):
                now = time.monotonic()
                return [Answer(sent, now if max_tokens == 1 else None, now, n) for n in json.loads(line)["tokens"]]
        raise SystemExit(f"OpenVINO ended with status {await self._process.wait()}")


PEERS = {
    "blitzjax-1x2": lambda checkpoint, directory: Blitzjax(checkpoint, directory, 1),
    "blitzjax-2x1": lambda checkpoint, directory: Blitzjax(checkpoint, directory, 2),
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
    "transformers": Transformers,
    "openvino": OpenVino,
}

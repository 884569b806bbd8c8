"""The nouns of blitzjax: values that cross package borders. Stdlib only, frozen, no behaviour beyond arithmetic.

A model is cut into **units**: units 0..L-1 are the decoder layers, unit L is the embedding, unit L+1 is the head. Units
arrive in that order, so a single watermark (`units`) says what an instance holds. The embedding comes late because it
is as large as many layers and only few of its rows are needed: a live partner lends a prompt's embedded rows.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

RequestId: TypeAlias = str
InstanceId: TypeAlias = str

LiveMode: TypeAlias = Literal["zigzag", "best_effort", "off"]
Source: TypeAlias = Literal["multicast", "unicast", "disk"]
Roles: TypeAlias = Literal["mixed", "split"]
ToolCallParser: TypeAlias = Literal["auto", "hermes", "llama3_json", "mistral", "qwen3_coder"]
FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
Option: TypeAlias = "bool | int | float | str | tuple[Option, ...]"

DTYPES = ("bfloat16", "float32", "int8")  # of ModelSpec
DEFAULT_MAX_TOKENS = 128  # of an answer; shrinks to what fits behind the prompt
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKENS = 64
PRIORITY_S = 60.0  # what one step of priority is worth in waiting time; see Request.rank_s


class Role(enum.Enum):
    """What the brain uses an instance for. Instances do not know: each decodes what it holds until a Migrate comes."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    __hash__ = object.__hash__  # as Phase's


class Phase(enum.Enum):
    """What an instance is doing with its parameters; see control/lifecycle.py for the legal moves."""

    IDLE = "idle"  # process up, compiled, an instance of no model; may keep host copies
    LOADING = "loading"  # parameters arriving, executes nothing
    LIVE = "live"  # parameters arriving, executes the layers it has, with an overloaded partner if any serves
    SERVING = "serving"  # holds every unit
    DRAINING = "draining"  # finishes what it has, takes nothing new
    FAILED = "failed"  # process gone

    __hash__ = object.__hash__  # a key of what every event touches; Enum's own hashes the name each time


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder without its arrays. `family` names the module in `blitzjax.models` that builds it."""

    name: str
    family: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    max_len: int  # tokens, prompt and answer together
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    dtype: str  # of the parameters: "bfloat16", "float32", or "int8" for the matrices of layers
    eos_token_ids: tuple[int, ...] = ()
    layer_kinds: tuple[str, ...] = ()  # one name per layer; layers of one kind run the same code. Empty: all alike
    options: tuple[tuple[str, Option], ...] = ()  # what the family's code needs to know beyond this, by name

    @property
    def units(self) -> int:
        """Number of units: layers, embedding, head."""
        return self.layers + 2

    @property
    def embed_unit(self) -> int:
        return self.layers

    @property
    def head_unit(self) -> int:
        return self.layers + 1

    @property
    def compute_dtype(self) -> str:
        """Of what matrices multiply, of embeddings and of the head."""
        return compute_dtype(self.dtype)

    def layers_loaded(self, units: int) -> int:
        """Decoder layers inside a watermark of `units` units."""
        return max(0, min(units, self.layers))


def compute_dtype(dtype: str) -> str:
    """Of a model of `dtype`; and what its checkpoint is read in."""
    return "bfloat16" if dtype == "int8" else dtype


def frozen(value: object) -> object:
    """A JSON value with every list in it made a tuple, as the fields of ModelSpec are."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def spec_from(table: Mapping[str, object]) -> ModelSpec:
    """The one that `dataclasses.asdict` and JSON made `table` of. Raises TypeError for other names than its fields'."""
    return ModelSpec(**{name: frozen(value) for name, value in table.items()})  # type: ignore[arg-type]  # as written


@dataclass(frozen=True, slots=True)
class Span:
    """Decoder layers [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LogitBias:
    """`bias` is added to the logit of `token_id`."""

    token_id: int
    bias: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the defaults are greedy and change nothing. Meanings and order are vLLM's."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    repetition_penalty: float = 1.0  # over prompt and answer
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: tuple[LogitBias, ...] = ()  # at most MAX_LOGIT_BIAS
    seed: int = 0
    min_tokens: int = 0  # nothing stops the answer before it has this many
    stop_token_ids: tuple[int, ...] = ()  # at most MAX_STOP_TOKENS
    ignore_eos: bool = False
    logprobs: int = -1  # -1: none; N <= MAX_LOGPROBS: of each token of the answer, and of the N likeliest
    prompt_logprobs: int = -1  # the same for the tokens of the prompt
    grammar: str = ""  # llguidance's; what the answer must follow


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a token, whatever the sampling; `top_ids` are the likeliest, best first."""

    logprob: float
    rank: int  # 1: no token was likelier
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What scheduling needs to know of a request: sizes, never tokens. `beginnings` are names of how its prompt begins,
    see control/prefixes.py; empty: nothing is known of that.
    """

    id: RequestId
    model: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    priority: int = 0  # lower goes first, as in vLLM
    beginnings: tuple[int, ...] = ()

    @property
    def rank_s(self) -> float:
        """Requests go in this order. One of priority p is overtaken by those of a lower q that arrive less than
        (p - q) * PRIORITY_S after it, and by no others: nothing starves.
        """
        return self.arrival_s + self.priority * PRIORITY_S

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """A request as an instance receives it: prompt ids, tokens already emitted by an earlier attempt, sampling."""

    request: Request
    attempt: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Chain:
    """One multicast chain: `instances[0]` sends units [start_unit, stop_unit), each next one receives and forwards.

    `generation` picks a fresh clique when the same members failed before. With `lanes` > 1 it moves the `lane`-th of
    that many equal parts of every unit: the plan's lanes meet in its rings, which gather what they bring.
    """

    instances: tuple[InstanceId, ...]
    start_unit: int
    stop_unit: int
    generation: int
    lane: int = 0
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Ring:
    """Targets inside one fast domain, of every lane at least one, that give each other their parts of every unit."""

    instances: tuple[InstanceId, ...]
    generation: int  # as a chain's


@dataclass(frozen=True, slots=True)
class MulticastPlan:
    """Chains that move one model's parameters; `ticket` identifies the plan cluster-wide and only grows.

    Every target of a chain with lanes is in one ring. Receivers become instances of `model`, or, of a plan that is a
    `copy`, keep what they receive in host memory.
    """

    ticket: int
    model: str
    chains: tuple[Chain, ...]
    rings: tuple[Ring, ...] = ()
    copy: bool = False


@dataclass(frozen=True, slots=True)
class LivePair:
    """`new` runs the layers it has, `old` (overloaded, complete) pulls and runs the rest."""

    old: InstanceId
    new: InstanceId
    mode: LiveMode

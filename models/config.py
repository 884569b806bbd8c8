"""Reads a published config.json as a ModelSpec; what a family adds to that it says in its own file.

Invariant: a setting that would change tokens and that is not understood raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blitzjax.errors import CheckpointError
from blitzjax.models.design import DENSE, SLIDING, Design
from blitzjax.models.rope import read_rope
from blitzjax.types import ModelSpec, Option

_OLDER = {  # key → its name in GPT-2's time
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one config.json, over those that the family takes for granted. A null is the lack of something,
    also of what would be taken for granted. Errors say `where` they are.
    """

    values: Mapping[str, object]
    where: str = "config.json"

    def get(self, key: str, default: object = None):
        value = self.values.get(self._given(key))
        return default if value is None else value

    def _given(self, key: str) -> str:
        """What `key` is called here."""
        return next((name for name in (key, _OLDER.get(key, key)) if self.values.get(name) is not None), key)

    def need(self, key: str):
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return value

    def only(self, key: str, *supported: object, instead: str = "") -> None:
        """Raises CheckpointError unless `key` is absent or has one of the supported values."""
        value = self.get(key)
        if value is not None and value not in supported:
            raise CheckpointError(f"{self.where}: {self._given(key)} = {value!r} is not supported; "
                                  f"supported: {instead or ', '.join(map(repr, supported))}")

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        self.only(key, *_ACTIVATIONS)
        return _ACTIVATIONS[self.get(key, default)]


Options = Callable[[Config], dict[str, Option]]
LayerKinds = Callable[[Config], tuple[str, ...]]


def read_spec(options: Options, layer_kinds: LayerKinds, defaults: Mapping[str, object], family: str,
              values: Mapping[str, object], name: str, dtype: str) -> ModelSpec:
    """The ModelSpec of config.json's `values`. Raises CheckpointError naming what is missing or not supported."""
    config = Config({**defaults, **values})
    added = options(config)
    config.only("is_encoder_decoder", False)
    heads, dim = config.need("num_attention_heads"), config.need("hidden_size")
    head_dim, kinds = config.get("head_dim", dim // heads), layer_kinds(config)
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
    theta, rope_options, max_len = read_rope(config, head_dim)
    if "rope_dims" in rope_options and "partial_rotary_factor" not in defaults:
        raise CheckpointError(f"config.json: a partial_rotary_factor is not supported for {family}, whose heads turn whole")
    if "full_attention" in config.get("rope_parameters", {}) and "rope_local_base_freq" not in defaults:
        raise CheckpointError(f"config.json: rope_parameters by layer type are not supported for {family}: all have the same")
    ends = config.get("eos_token_id", ())
    return ModelSpec(
        name=name, family=family, layers=config.need("num_hidden_layers"), dim=dim, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim,
        ffn_dim=config.get("intermediate_size", 4 * dim), vocab=config.need("vocab_size"), max_len=max_len,
        rope_theta=theta, norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False), dtype=dtype,
        eos_token_ids=tuple(ends) if isinstance(ends, list | tuple) else (ends,),
        layer_kinds=kinds if any(kind != "layer" for kind in kinds) else (),
        options=_differing(rope_options | added))


def _differing(options: dict[str, Option]) -> tuple[tuple[str, Option], ...]:
    usual = Design()
    return tuple((name, value) for name, value in sorted(options.items()) if value != getattr(usual, name))


def plain(config: Config) -> tuple[str, ...]:
    """Every layer sees everything; a window in the config is refused."""
    config.only("use_sliding_window", False)
    return ("layer",) * config.need("num_hidden_layers")


def windowed(config: Config) -> tuple[str, ...]:
    """Every layer has the window, if there is one."""
    return (SLIDING if config.get("sliding_window") else "layer",) * config.need("num_hidden_layers")


def typed(config: Config, default: Callable[[int], bool]) -> tuple[str, ...]:
    """The kinds that `layer_types` lists; without it layer i has the window where `default(i)`."""
    count = config.need("num_hidden_layers")
    types = config.get("layer_types", ["sliding_attention" if default(i) else "full_attention" for i in range(count)])
    if len(types) != count:
        raise CheckpointError(f"config.json: layer_types lists {len(types)} layers, num_hidden_layers is {count}")
    for found in types:
        if found not in ("sliding_attention", "full_attention"):
            raise CheckpointError(f"config.json: layer_types: {found!r} is not supported")
        if found == "sliding_attention":
            config.need("sliding_window")
    return tuple(SLIDING if found == "sliding_attention" else "layer" for found in types)


def sparse(config: Config, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """`kinds` with the layers marked that have no experts."""
    step, only = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    dense = [i in only or (i + 1) % step != 0 for i in range(len(kinds))]
    names = {"layer": DENSE, SLIDING: f"{SLIDING}-{DENSE}"}
    return tuple(names[kind] if marked else kind for kind, marked in zip(kinds, dense, strict=True))

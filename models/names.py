"""Published tensor names as a table, and how the tensors become the fused arrays of the decoder.

A table maps roles to names; a family lists only the names that it has otherwise. Invariant: every tensor that `tensors`
names is used by `fuse`, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from blitzjax.models.design import DENSE, design
from blitzjax.types import ModelSpec

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]  # role → its published array

LLAMA = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
    "shared_router": "mlp.shared_expert_gate.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
}


@dataclass(frozen=True, slots=True)
class Names:
    """One family's table: `own` over llama's. A bias is named after its weight.

    Roles that stand for several: "qkv" (rows of q, k, v), "gate_up" (rows of gate, then up), "experts_gate_up" and
    "experts_down" (all experts in one tensor [E, in, out], gate and up in turns).
    """

    own: Mapping[str, str] = field(default_factory=dict)
    layer_prefix: str = "model.layers.{}."
    in_out: bool = False  # matrices of layers are published [in, out]

    def of(self, role: str) -> str:
        """"q" → its name; also "q_bias", and "expert_up 3" for that of an expert."""
        suffix = "_bias" if role.endswith("_bias") else ""
        stem, _, expert = role.removesuffix(suffix).partition(" ")
        name = {**LLAMA, **self.own}[stem].format(expert)
        return f"{name.removesuffix('.weight')}.bias" if suffix and name.endswith(".weight") else name + suffix


def tensors(names: Names, spec: ModelSpec, kind: str) -> Shapes:
    """Published tensor names (within `names.layer_prefix` for a layer) and their shapes."""
    turned = names.in_out and kind not in ("embed", "head")
    shapes = _shapes(names, spec, kind)
    return {names.of(role): shape[::-1] if turned else shape for role, shape in shapes.items()}


def fuse(names: Names, spec: ModelSpec, kind: str, published: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that `tensors` names → the arrays of Embed, Layer or Head."""
    offset = design(spec).norm_offset

    def read(role: str) -> np.ndarray:
        array = published[names.of(role)]
        if offset and role.endswith("norm"):
            return array.astype(np.float32) + np.float32(offset)
        return array.T if names.in_out and kind not in ("embed", "head") else array

    shapes = _shapes(names, spec, kind)
    match kind:
        case "embed":
            return {"table" if role == "embed" else role: read(role) for role in shapes}
        case "head":
            return {"w" if role == "head" else role: read(role) for role in shapes}
    same = {role: read(role) for role in shapes if "norm" in role or role in ("o_bias", "down_bias")}
    return same | _attention(spec, shapes, read) | _feed_forward(spec, kind, shapes, read)


def _shapes(names: Names, spec: ModelSpec, kind: str) -> Shapes:
    """Role → published shape, matrices [out, in]."""
    traits, dim, shapes = design(spec), (spec.dim,), Shapes()
    if kind == "embed":
        shapes["embed"] = (spec.vocab, spec.dim)
        return shapes | ({"positions": (spec.max_len, spec.dim)} if traits.learned_positions else {})
    if kind == "head":
        shapes |= {"norm": dim} | ({"norm_bias": dim} if traits.layer_norm else {})
        return shapes | ({} if spec.tied_embeddings else {"head": (spec.vocab, spec.dim)})
    kept = ["attn_norm", "ffn_norm"] * traits.pre_norm + ["attn_post_norm", "ffn_post_norm"] * traits.post_norm
    shapes |= {norm: dim for norm in kept}
    if traits.layer_norm:
        shapes |= {f"{norm}_bias": dim for norm in kept}
    shapes |= _attention_shapes(names, spec)
    if traits.experts and DENSE not in kind:
        return shapes | _expert_shapes(names, spec)
    parts = {"gate": spec.ffn_dim, "up": spec.ffn_dim} if traits.gated else {"up": spec.ffn_dim}
    merged = {"gate_up": 2 * spec.ffn_dim} if "gate_up" in names.own else parts
    return shapes | _matrices(merged, spec.dim, traits.mlp_bias) | _matrices({"down": spec.dim}, spec.ffn_dim,
                                                                             traits.mlp_bias)


def _matrices(rows: Mapping[str, int], columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {role: (count, columns) for role, count in rows.items()}
    return shapes | ({f"{role}_bias": (count,) for role, count in rows.items()} if bias else {})


def _attention_shapes(names: Names, spec: ModelSpec) -> Shapes:
    traits, q, kv = design(spec), spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = {"qkv": q + 2 * kv} if "qkv" in names.own else {"q": q, "k": kv, "v": kv}
    shapes = _matrices(rows, spec.dim, traits.qkv_bias) | _matrices({"o": spec.dim}, q, traits.o_bias)
    match traits.qk_norm:
        case "head":
            shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
        case "all":
            shapes |= {"q_norm": (q,), "k_norm": (kv,)}
    return shapes | ({"sinks": (spec.heads,)} if traits.sinks else {})


def _expert_shapes(names: Names, spec: ModelSpec) -> Shapes:
    traits, dim, inner = design(spec), spec.dim, design(spec).expert_dim
    shapes = _matrices({"router": traits.experts}, dim, traits.expert_bias)
    if "experts_gate_up" in names.own:
        for role, columns, rows in (("experts_gate_up", dim, 2 * inner), ("experts_down", inner, dim)):
            shapes |= {role: (traits.experts, columns, rows), f"{role}_bias": (traits.experts, rows)}
    else:
        for expert in range(traits.experts):
            shapes |= {f"expert_gate {expert}": (inner, dim), f"expert_up {expert}": (inner, dim),
                       f"expert_down {expert}": (dim, inner)}
    if traits.shared_dim:
        shared = {"shared_gate": traits.shared_dim, "shared_up": traits.shared_dim, "shared_router": 1}
        shapes |= _matrices(shared, dim, bias=False) | {"shared_down": (dim, traits.shared_dim)}
    return shapes


def _attention(spec: ModelSpec, shapes: Shapes, read: Read) -> dict[str, np.ndarray]:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def heads(suffix: str) -> np.ndarray:  # [KV, G+2, hd, D], of biases [KV, G+2, hd]
        if f"qkv{suffix}" in shapes:
            parts = np.split(read(f"qkv{suffix}"), [q, q + kv])
        else:
            parts = [read(f"{role}{suffix}") for role in "qkv"]
        rest = parts[0].shape[1:]
        return np.concatenate([part.reshape(spec.kv_heads, -1, spec.head_dim, *rest) for part in parts], axis=1)

    arrays = {"qkv": heads(""), "o": read("o").reshape(spec.dim, spec.kv_heads, -1)}
    if design(spec).qkv_bias:
        arrays["qkv_bias"] = heads("_bias")
    if design(spec).qk_norm == "all":
        arrays["q_norm"] = read("q_norm").reshape(spec.kv_heads, -1, spec.head_dim)
        arrays["k_norm"] = read("k_norm").reshape(spec.kv_heads, spec.head_dim)
    if design(spec).sinks:
        arrays["sinks"] = read("sinks").reshape(spec.kv_heads, -1)
    return arrays


def _feed_forward(spec: ModelSpec, kind: str, shapes: Shapes, read: Read) -> dict[str, np.ndarray]:
    if design(spec).experts and DENSE not in kind:
        made = _experts(spec, shapes, read)
        return {f"experts.{name}": array for name, array in made.items()}

    def gate_up(suffix: str) -> np.ndarray:  # [F, 2, D] or [F, 1, D], of biases without D
        if f"gate_up{suffix}" in shapes:
            return np.stack(np.split(read(f"gate_up{suffix}"), 2), axis=1)
        return np.stack([read(f"{role}{suffix}") for role in ("gate", "up") if f"{role}{suffix}" in shapes], axis=1)

    biases = {"gate_up_bias": gate_up("_bias")} if design(spec).mlp_bias else {}
    return {"gate_up": gate_up(""), "down": read("down")} | biases


def _experts(spec: ModelSpec, shapes: Shapes, read: Read) -> dict[str, np.ndarray]:
    """→ gate_up [E, F, 2, D], down [E, D, F] and what the design has besides."""
    traits = design(spec)
    arrays = {"router": read("router")}
    if "experts_gate_up_bias" in shapes:
        gate_up, down = (read(role).swapaxes(1, 2) for role in ("experts_gate_up", "experts_down"))  # [E, out, in]
        units = (traits.experts, traits.expert_dim, 2)  # gate and up in turns
        arrays |= {"gate_up": gate_up.reshape(*units, spec.dim), "down": down,
                   "gate_up_bias": read("experts_gate_up_bias").reshape(units),
                   "down_bias": read("experts_down_bias"), "router_bias": read("router_bias")}
    else:
        each = range(traits.experts)
        arrays |= {"gate_up": np.stack([np.stack([read(f"expert_gate {e}"), read(f"expert_up {e}")], axis=1)
                                        for e in each]),
                   "down": np.stack([read(f"expert_down {e}") for e in each])}
    if traits.shared_dim:
        arrays |= {"shared_gate": read("shared_router"), "shared_down": read("shared_down"),
                   "shared_gate_up": np.stack([read("shared_gate"), read("shared_up")], axis=1)}
    return arrays

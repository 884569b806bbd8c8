"""What differs between decoders of one line: a value that picks norms, biases, windows, ropes, activation and experts.

Invariant: the defaults are llama's; a ModelSpec's `options` hold only what a model has otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from blitzjax.types import ModelSpec

SLIDING, DENSE = "sliding", "dense"  # words in the kinds of layers: "layer", "sliding", "dense", "sliding-dense"


@dataclass(frozen=True, slots=True)
class Design:
    """Zero and the empty value mean "none" throughout.

    Layers of a kind with the word SLIDING see `window` tokens; those with the word DENSE have one feed-forward of
    `ModelSpec.ffn_dim` although other layers have experts.
    """

    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    pre_norm: bool = True  # norms in front of attention and feed-forward
    post_norm: bool = False  # norms on what they add to the residual
    norm_offset: float = 0.0  # what published norm scales lack
    activation: str = "silu"  # see blocks.activate
    gated: bool = True  # activation(gate) * up; otherwise activation(up)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # of queries and keys: "head", each head alone, or "all", the heads of a token together

    window: int = 0  # tokens that SLIDING layers see
    scale: float = 0.0  # of attention scores instead of head_dim ** -0.5
    softcap: float = 0.0  # of attention scores
    sinks: bool = False

    learned_positions: bool = False
    rope_dims: int = 0  # dimensions of a head that turn; 0: all
    rope_factors: tuple[float, ...] = ()  # divide the frequencies; one for each pair of dimensions
    long_rope_factors: tuple[float, ...] = ()  # instead of them where contexts are longer, see rope.for_context
    short_context: int = 0  # tokens; what is longer takes the long factors
    rope_scale: float = 1.0  # of the sines and cosines
    sliding_rope_theta: float = 0.0  # SLIDING layers have a rope of their own, without factors

    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    shared_dim: int = 0  # of an expert that sees every token, behind a gate of its own
    renormalize: bool = True  # the weights of a token's experts add up to 1
    expert_bias: bool = False  # of the experts and their router


@functools.cache
def design(spec: ModelSpec) -> Design:
    """Raises TypeError for an option that Design does not have."""
    return Design(**dict(spec.options))  # type: ignore[arg-type]  # an option has the type of the field it names

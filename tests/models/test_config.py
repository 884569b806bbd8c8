"""config.json becomes a ModelSpec, in the style of any year, or an error that names what is in the way."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from blitzjax.errors import CheckpointError
from blitzjax.models import family, mxfp4, read_config
from blitzjax.serve import codec
from blitzjax.types import ModelSpec

REFERENCE = Path(__file__).parents[1] / "reference"
CONFIGS = {case: found["config"] for case, found in json.loads((REFERENCE / "families.json").read_text()).items()}


def read(case: str, *without: str, **settings: object) -> ModelSpec:
    """The case's config with some settings changed."""
    config = {key: value for key, value in CONFIGS[case].items() if key not in without}
    return read_config(config | settings, "m", "float32")


@pytest.mark.parametrize("case", CONFIGS)
def test_spec_survives_the_manifest(case: str) -> None:
    assert codec.model_spec(json.dumps({"spec": asdict(read(case))})) == read(case)


@pytest.mark.parametrize(("case", "settings", "message"), [
    ("llama", {"model_type": "mamba"}, "'mamba' is not supported; supported: gemma, .*qwen3_moe; .*own Flax"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; supported: 'silu'"),
    ("llama", {"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq.* is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported; supported: default"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers, num_hidden_layers is 3"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("phi3", {"attention_bias": True}, "attention_bias = True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("gpt_oss", {"swiglu_limit": 9.0}, "swiglu_limit = 9.0 is not supported; supported: 7.0"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'.*supported: 'mxfp4'")])
def test_what_is_not_supported_is_named(case: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(case, **settings)


def test_config_without_a_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type is missing"):
        read("llama", "model_type")


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt_oss"])
def test_older_style_of_rope_gives_the_same(case: str) -> None:
    scaling = dict(CONFIGS[case]["rope_parameters"])
    beside = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    scaling["type"] = scaling.pop("rope_type")
    assert read(case, "rope_parameters", rope_scaling=scaling, **beside) == read(case)


def test_older_style_of_two_ropes_gives_the_same() -> None:
    old = read("gemma3", "rope_parameters", rope_scaling={"rope_type": "linear", "factor": 8.0},
               rope_theta=1e6, rope_local_base_freq=1e4)
    assert old == read("gemma3")


def test_layers_of_older_configs_follow_the_family() -> None:
    def layers(case: str, **settings: object) -> tuple[str, ...]:
        return read(case, "layer_types", num_hidden_layers=4, **settings).layer_kinds

    assert layers("gemma2") == ("sliding", "layer") * 2
    assert layers("gemma3", sliding_window_pattern=3) == ("sliding", "sliding", "layer", "sliding")
    assert layers("gpt_oss") == ("sliding", "layer") * 2
    assert layers("qwen2", max_window_layers=3) == ("layer", "layer", "layer", "sliding")
    assert layers("mistral") == ("sliding",) * 4
    assert layers("mistral", sliding_window=None) == ()
    assert layers("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=2) == ("dense", "layer") * 2
    assert layers("qwen2_moe", use_sliding_window=True, sliding_window=7, max_window_layers=4) == (
        "sliding", "dense", "sliding", "layer")


def test_sequences_end_where_short_rope_factors_do() -> None:
    assert read("phi3", max_position_embeddings=4096).max_len == 64


def test_gemma3_of_the_text_model_alone_is_gemma3() -> None:
    assert CONFIGS["gemma3"]["model_type"] == "gemma3_text" and read("gemma3").family == "gemma3"


def test_mxfp4_experts_are_what_transformers_unpacks() -> None:
    with np.load(REFERENCE / "families.npz") as file:
        blocks, scales, weights = (file[f"mxfp4.{name}"] for name in ("blocks", "scales", "weights"))
    np.testing.assert_array_equal(mxfp4.dequantize(blocks, scales).swapaxes(1, 2), weights)


def test_mxfp4_checkpoint_gives_the_arrays_of_a_plain_one() -> None:
    plain = read("gpt_oss", hidden_size=64, intermediate_size=32)
    packed = read("gpt_oss", hidden_size=64, intermediate_size=32, quantization_config={"quant_method": "mxfp4"})
    found, rng = family("gpt_oss"), np.random.default_rng(0)
    published = {name: rng.integers(0, 256, shape, np.uint8) if name.endswith("_blocks")
                 else rng.integers(120, 130, shape).astype(np.uint8) if name.endswith("_scales")
                 else rng.standard_normal(shape, np.float32)
                 for name, shape in found.tensors(packed, "layer").items()}
    unpacked = {name: value for name, value in published.items() if not name.endswith(("_blocks", "_scales"))}
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        values = mxfp4.dequantize(published[f"{name}_blocks"], published[f"{name}_scales"])
        unpacked[name] = values.swapaxes(1, 2)  # as transformers publishes what it has unpacked: [E, in, out]
    assert {name: value.shape for name, value in unpacked.items()} == found.tensors(plain, "layer")
    expected = found.fuse(plain, "layer", unpacked)
    for name, array in found.fuse(packed, "layer", published).items():
        np.testing.assert_array_equal(array, expected[name])

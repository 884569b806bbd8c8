"""config.json becomes a ModelSpec, in the style of any year, or an error that names what is in the way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from blitzjax.errors import CheckpointError
from blitzjax.models import read_config, read_packing
from blitzjax.models.fp8 import FP8
from blitzjax.models.mxfp4 import MXFP4
from blitzjax.models.rope import for_context
from blitzjax.serve import codec
from blitzjax.types import ModelSpec

REFERENCE = Path(__file__).parents[1] / "reference"
CONFIGS = {case: found["config"] for case, found in json.loads((REFERENCE / "families.json").read_text()).items()}


def read(case: str, *without: str, **settings: object) -> ModelSpec:
    """The case's config with some settings changed."""
    config = {key: value for key, value in CONFIGS[case].items() if key not in without}
    return read_config(config | settings, "m", "float32")


def packed(**changes: object) -> dict[str, object]:
    """A quantization_config of llm-compressor's with some settings changed, at the top or of the weights."""
    top = {"format": "float-quantized", "quant_method": "compressed-tensors", "transform_config": {},
           "sparsity_config": {"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    weights |= {key: value for key, value in changes.items() if key in weights}
    top |= {key: value for key, value in changes.items() if key not in weights}
    return {"quantization_config": top | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}}


@pytest.mark.parametrize("case", CONFIGS)
def test_spec_survives_the_manifest(case: str) -> None:
    assert codec.model_spec(json.dumps({"spec": asdict(read(case))})) == read(case)


@pytest.mark.parametrize(("case", "settings", "message"), [
    ("llama", {"model_type": "mamba"}, "'mamba' is not supported; supported: gemma, .*qwen3_moe; .*own Flax"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; supported: 'silu'"),
    ("llama", {"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq' is not .*: mxfp4, fp8, .* a copy "),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quant_method is missing"),
    ("llama", packed(format="pack-quantized"), "quantization_config: format = 'pack-quantized' is not supported"),
    ("llama", packed(num_bits=4), "quantization_config: group_0: weights: num_bits = 4 is not supported; supported: 8"),
    ("llama", packed(type="int"), "group_0: weights: type = 'int' is not supported; supported: 'float'"),
    ("llama", packed(strategy="group"), "group_0: weights: strategy = 'group' is not supported; supported: tensor, "),
    ("llama", packed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: format = .*24.* supported: 'dense'"),
    ("llama", packed(transform_config={"config_groups": {}}), "transform_config = .* is not supported; supported: none"),
    ("qwen3", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt = 'e5m2' is not .*: 'e4m3'"),
    ("qwen3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size = 128 is not a"),
    ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope type 'axial' is not supported; supported: default"),
    ("llama", {"rope_parameters": {"attn_factor": 2.0}}, "rope parameter 'attn_factor' = 2.0 is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers, num_hidden_layers is 3"),
    ("mistral", {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "sliding_window is missing"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported; supported: 'gelu'"),
    ("gemma", {"partial_rotary_factor": 0.5}, "a partial_rotary_factor is not supported for gemma, whose heads turn whole"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported for llama"),
    ("qwen2", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "by layer type are not .* for qwen2"),
    ("gemma3", {"model_type": "gemma3"}, "model_type = 'gemma3' has no text_config"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported; supported: null"),
    ("phi3", {"attention_bias": True}, "attention_bias = True"),
    ("phi3", {"head_dim": 16}, "3 short and 3 long rope factors for 6 pairs"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"activation_function": "gelu_10"}, "activation_function = 'gelu_10' is not supported"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("gpt_oss", {"swiglu_limit": 9.0}, "swiglu_limit = 9.0 is not supported; supported: 7.0"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'.*supported: mxfp4")])
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
    mixed = {"layer_types": ["full_attention", *["sliding_attention"] * 3]}
    for model_type in ("mistral", "ministral"):
        assert layers("mistral", model_type=model_type, **mixed) == ("layer", *["sliding"] * 3)
    assert layers("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=2) == ("dense", "layer") * 2
    assert layers("qwen2_moe", use_sliding_window=True, sliding_window=7, max_window_layers=4) == (
        "sliding", "dense", "sliding", "layer")


def test_long_rope_factors_hold_where_sequences_may_be_longer_than_the_short_ones() -> None:
    """Of Phi-4-mini's shape: by the length that is served, whatever a sequence's own."""
    def factors(spec: ModelSpec, tokens: int) -> object:
        served = for_context(spec, tokens)
        assert served == replace(spec, options=served.options)
        return dict(served.options)["rope_factors"]

    spec = read("phi3", max_position_embeddings=4096)
    assert spec.max_len == 4096 and for_context(spec, 64) == spec
    assert factors(spec, 64) == (1.0, 1.1, 1.3) and factors(spec, 65) == factors(spec, 8192) == (2.0, 3.0, 4.0)
    assert dict(for_context(spec, 65).options)["rope_scale"] == dict(spec.options)["rope_scale"] == np.sqrt(1 + 6 / 6)
    short = read("phi3", max_position_embeddings=64)  # a copy that was cut
    assert short.max_len == 64 and for_context(short, 8192) == short


def test_yarn_reaches_as_far_as_its_factor_where_the_model_card_only_adds_it() -> None:
    """Qwen's: `max_position_embeddings` stays what it was."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read("qwen2", "rope_parameters", rope_scaling=yarn, max_position_embeddings=40).max_len == 128
    assert read("gpt_oss", max_position_embeddings=300).max_len == 300


def test_of_an_original_context_said_twice_the_outer_one_holds() -> None:
    def spec(inner: int, **outer: int) -> ModelSpec:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": inner}
        return read("qwen2", "rope_parameters", rope_scaling=yarn, **outer)

    assert spec(64, original_max_position_embeddings=32) == spec(32) != spec(64)


def test_dynamic_rope_ends_before_it_differs() -> None:
    dynamic = read("qwen2", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert dynamic == read("qwen2", rope_parameters=None) and dynamic.max_len == 128


def test_what_older_configs_leave_out_is_as_transformers_has_it() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": False,
            "original_max_position_embeddings": 4096}
    left_out: dict[str, dict[str, object]] = {
        "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        "gpt_oss": {"rope_parameters": yarn, "rms_norm_eps": 1e-5}, "mistral": {"sliding_window": 4096},
        "mixtral": {"rope_parameters": {"rope_theta": 1e6}, "rms_norm_eps": 1e-5}, "olmo2": {"rms_norm_eps": 1e-5},
        "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        "qwen2": {"sliding_window": 4096}}
    for case, settings in left_out.items():
        assert read(case, *settings) == read(case, **settings), case


def test_a_null_is_the_lack_of_what_is_taken_for_granted() -> None:
    options = dict(read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).options)
    assert not {"softcap", "logit_softcap"} & options.keys()


def test_gemma3_of_the_text_model_alone_is_gemma3() -> None:
    assert CONFIGS["gemma3"]["model_type"] == "gemma3_text" and read("gemma3").family == "gemma3"


def test_text_decoder_behind_a_vision_tower_is_read() -> None:
    """Gemma 3's published text_config lists little."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    spec = read_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}, "m", "float32")
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab, spec.max_len) == (8, 4, 256, 262208, 131072)
    assert (spec.tied_embeddings, spec.eos_token_ids, spec.rope_theta) == (True, (1, 106), 1e6)
    assert dict(spec.options)["rope_factors"] == (8.0,) * 128
    assert spec.layer_kinds[4:7] == ("sliding", "layer", "sliding")
    mistral = read_config({"model_type": "mistral3", "text_config": CONFIGS["mistral"]}, "m", "float32")
    assert mistral == read("mistral", tie_word_embeddings=True)


def test_quantised_weights_are_of_the_same_model() -> None:
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert read("llama", **packed()) == read("llama", **blocks) == read("llama")
    inner = {"model_type": "mistral3", "text_config": CONFIGS["mistral"] | blocks}
    for values in (inner, {"model_type": "mistral3", "text_config": CONFIGS["mistral"]} | blocks, CONFIGS["mistral"] | blocks):
        assert read_packing(values) == FP8((128, 128))
    assert read_packing(CONFIGS["mistral"]) is None and read_packing(CONFIGS["llama"] | packed()).block == (1, 0)
    both = packed()["quantization_config"]
    both["config_groups"]["group_1"] = {"weights": both["config_groups"]["group_0"]["weights"] | {"strategy": "tensor"}}
    with pytest.raises(CheckpointError, match="config_groups share scales in 2 ways"):
        read("llama", quantization_config=both)


def test_mxfp4_experts_are_what_transformers_unpacks() -> None:
    with np.load(REFERENCE / "families.npz") as file:
        blocks, scales, weights = (file[f"mxfp4.{name}"] for name in ("blocks", "scales", "weights"))
    for dtype in ("float32", "bfloat16"):
        np.testing.assert_array_equal(MXFP4().dequantize(blocks, scales, np.dtype(dtype)).astype(np.float32), weights)

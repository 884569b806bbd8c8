"""Other formats: what their own writers wrote is what we convert, and everything wrong is said at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

import tiny_families
from blitzjax.engine import published
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import TINY, resolve
from blitzjax.engine.params import unit_kind
from blitzjax.engine.safetensors_reader import HuggingFace
from blitzjax.errors import CheckpointError
from blitzjax.models import family
from blitzjax.types import ModelSpec

SPEC = replace(TINY, layers=3, tied_embeddings=False, vocab=256)
FAMILIES = json.loads((Path(__file__).parents[1] / "reference" / "families.json").read_text())
HIDDEN = "model.layers.1.mlp.down_proj.weight"

CONFIG = {"model_type": "llama", "num_hidden_layers": SPEC.layers, "hidden_size": SPEC.dim, "vocab_size": SPEC.vocab,
          "num_attention_heads": SPEC.heads, "num_key_value_heads": SPEC.kv_heads, "intermediate_size": SPEC.ffn_dim,
          "max_position_embeddings": SPEC.max_len, "rope_theta": SPEC.rope_theta, "rms_norm_eps": SPEC.norm_eps,
          "tie_word_embeddings": False, "eos_token_id": 257, "bos_token_id": None}


def tensors(spec: ModelSpec = SPEC) -> dict[str, np.ndarray]:
    """Published tensors, exact in float16 and bfloat16 alike."""
    rng = np.random.default_rng(0)
    shapes = {name: shape for unit in published.wanted(spec, partial(published.names, spec))
              for name, shape in unit.items()}
    return {name: rng.integers(-128, 128, shape).astype(np.float32) / 64 for name, shape in shapes.items()}


def directory(path: Path, **changes: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


def assert_converted(path: Path, cache: Path, wanted: Mapping[str, np.ndarray]) -> None:
    """MODEL `path` becomes a checkpoint of SPEC with these published tensors."""
    opened = Checkpoint.open(resolve(str(path), "float32", cache))
    assert opened.spec == replace(SPEC, name=path.name)
    for unit in range(SPEC.units):
        named = {short: wanted[full] for short, full in published.names(SPEC, unit).items()}
        fused, found = family("llama").fuse(SPEC, unit_kind(SPEC, unit), named), opened.read_unit(unit)
        assert fused.keys() == found.keys()
        for name, array in fused.items():
            np.testing.assert_array_equal(found[name], array)


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face


def write_shards(path: Path, named: Mapping[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        return save_file(dict(named), path / "model.safetensors")
    names = [sorted(named)[n::shards] for n in range(shards)]
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    for file, part in zip(files, names, strict=True):
        save_file({name: named[name] for name in part}, path / file)
    placed = {name: file for file, part in zip(files, names, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize(("dtype", "shards"), [(np.float32, 1), (np.float16, 3), (ml_dtypes.bfloat16, 3)])
def test_hugging_face_directory(tmp_path: Path, dtype: type, shards: int) -> None:
    path = directory(tmp_path / "hf")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write_shards(path, {n: a.astype(dtype) for n, a in (tensors() | buffer).items()}, shards)
    assert_converted(path, tmp_path / "cache", tensors())


@pytest.mark.parametrize(("case", "bare"), [*((case, False) for case in FAMILIES), ("gpt2", True)])
def test_every_family_is_read_whole(tmp_path: Path, case: str, bare: bool) -> None:
    """Their checkpoints as transformers names them; `bare`: the trunk alone, as GPT-2 was published."""
    path, named = tmp_path / case, {n: tiny_families.values(case, n, s) for n, s in FAMILIES[case]["tensors"].items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(FAMILIES[case]["config"]))
    write_shards(path, {n.partition(".")[2] if bare else n: a for n, a in named.items()}, 2)
    opened = Checkpoint.open(resolve(str(path), "float32", tmp_path / "cache"))
    for unit in range(opened.spec.units):
        tensors = {short: named[full] for short, full in published.names(opened.spec, unit).items()}
        fused = family(opened.spec.family).fuse(opened.spec, unit_kind(opened.spec, unit), tensors)
        for name, array in opened.read_unit(unit).items():
            np.testing.assert_array_equal(array, fused[name])


def differing(path: Path, config: Mapping[str, object], named: Mapping[str, np.ndarray]) -> HuggingFace:
    """A checkpoint as somebody else wrote it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    write_shards(path, named, 1)
    return HuggingFace.open(path, "m", "float32")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_decoder_behind_a_vision_tower_is_the_one_without(tmp_path: Path, prefix: str) -> None:
    """Gemma 3 from 4B on; the names changed in 2025."""
    config, case = FAMILIES["gemma3"]["config"], "gemma3"
    named = {n: tiny_families.values(case, n, s) for n, s in FAMILIES[case]["tensors"].items()}
    tower = prefix.removesuffix("language_model.") if prefix.startswith("model.") else ""
    wrapped = {n.replace("model.", prefix, 1): a for n, a in named.items()} | {
        f"{tower}{n}": np.zeros(2, np.float32) for n in ("vision_tower.x.weight", "multi_modal_projector.y.weight")}
    plain = differing(tmp_path / "plain", config, named)
    outer = {"model_type": "gemma3", "text_config": config, "eos_token_id": config["eos_token_id"]}
    behind = differing(tmp_path / "wrapped", outer, wrapped)
    assert behind.spec == plain.spec
    for ours, theirs in zip(behind.units(), plain.units(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("bare", [False, True])
def test_head_that_is_not_the_embedding_is_used_whatever_the_config_says(tmp_path: Path, bare: bool) -> None:
    """As transformers does; the copy of a tied embedding is none."""
    config = FAMILIES["gpt2"]["config"]
    named = {n: tiny_families.values("gpt2", n, s) for n, s in FAMILIES["gpt2"]["tensors"].items()}
    table = named["transformer.wte.weight"]
    trunk = {n.partition(".")[2] if bare else n: a for n, a in named.items()}
    assert config["tie_word_embeddings"]
    copied = differing(tmp_path / "copied", config, trunk | {"lm_head.weight": table})
    own = differing(tmp_path / "own", config, trunk | {"lm_head.weight": table + 1})
    assert copied.spec.tied_embeddings and not own.spec.tied_embeddings
    np.testing.assert_array_equal(list(own.units())[-1]["w"], table + 1)


def test_buffers_may_have_any_type(tmp_path: Path) -> None:
    """GPT-2's masks, as transformers saved them for years."""
    named = {n: tiny_families.values("gpt2", n, s) for n, s in FAMILIES["gpt2"]["tensors"].items()}
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), bool),
             "transformer.h.0.attn.masked_bias": np.float32([-1e4])}
    plain, masked = (differing(tmp_path / name, FAMILIES["gpt2"]["config"], named | more)
                     for name, more in (("plain", {}), ("masked", masks)))
    for want, got in zip(plain.units(), masked.units(), strict=True):
        assert want.keys() == got.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_changed_directory_is_converted_again(tmp_path: Path) -> None:
    path, cache = directory(tmp_path / "hf"), tmp_path / "cache"
    write_shards(path, tensors(), 1)
    first = resolve(str(path), "float32", cache)
    assert resolve(str(path), "float32", cache) == first
    changed = tensors() | {HIDDEN: np.ones((SPEC.dim, SPEC.ffn_dim), np.float32)}
    (path / "model.safetensors").unlink()
    write_shards(path, changed, 2)
    assert_converted(path, cache, changed)


def test_a_file_of_all_tensors_goes_before_shards_of_an_earlier_save(tmp_path: Path) -> None:
    path = directory(tmp_path / "hf")
    write_shards(path, {name: np.zeros_like(array) for name, array in tensors().items()}, 2)
    write_shards(path, tensors(), 1)
    assert_converted(path, tmp_path / "cache", tensors())


def test_every_mismatch_is_in_one_error(tmp_path: Path) -> None:
    path, named = directory(tmp_path / "hf"), tensors()
    del named[HIDDEN]
    named |= {"model.norm.weight": np.zeros(7, np.float32), "extra.bias": np.zeros(1, np.float32),
              "lm_head.weight": np.zeros((SPEC.vocab, SPEC.dim), np.int8)}
    write_shards(path, named, 2)
    (gone,) = path.glob("*-00002-of-*")
    lost = next(name for name in sorted(named)[1::2] if name != HIDDEN)
    gone.unlink()
    with pytest.raises(CheckpointError) as caught:
        resolve(str(path), "float32", tmp_path / "cache")
    for text in (f"{HIDDEN} is missing (layer 1)", f"{lost} is missing", f"the file {gone.name} is missing",
                 "extra.bias is unexpected"):
        assert text in str(caught.value)
    write_shards(path, named, 1)
    with pytest.raises(CheckpointError) as caught:
        resolve(str(path), "float32", tmp_path / "cache")
    for text in ("model.norm.weight has shape (7,), should be (64,) (head)", "lm_head.weight has dtype I8",
                 "4 problems"):
        assert text in str(caught.value)


@pytest.mark.parametrize(("keep", "says"), [(0, "not a readable safetensors"), (5, "not a readable"),
                                            (40, "not a readable"), (-1, "is incomplete")])
def test_damaged_safetensors_are_reported(tmp_path: Path, keep: int, says: str) -> None:
    path = directory(tmp_path / "hf")
    write_shards(path, tensors(), 1)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"model.safetensors .*{says}"):
        resolve(str(path), "float32", tmp_path / "cache")


@pytest.mark.parametrize(("changes", "says"), [
    ({"model_type": "mamba"}, "'mamba' is not supported; supported: .*llama"),
    ({"model_type": "os:abort"}, "'os:abort' is not supported"),
    ({"rope_scaling": {"rope_type": "novel"}}, "novel.*not supported"), ({"vocab_size": None}, "vocab_size")])
def test_unknown_configuration_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = directory(tmp_path / "hf", **changes)
    write_shards(path, tensors(), 1)
    with pytest.raises(CheckpointError, match=says):
        resolve(str(path), "float32", tmp_path / "cache")


def test_directory_of_nothing_says_what_it_may_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="manifest.json.*safetensors.*Orbax"):
        resolve(str(directory(tmp_path / "hf")), "float32", tmp_path / "cache")


def test_a_repository_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    write_shards(directory(repository / "snapshots" / ("0" * 40)), tensors(), 2)
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "BLITZJAX_CACHE": str(tmp_path / "ours")}

    def converted(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "blitzjax.cli", "convert", name, "--dtype", "float32"], env=env,
                              capture_output=True, text=True)

    first, second = converted("acme/mine"), converted("acme/mine")
    assert first.returncode == 0, first.stderr
    assert second.stdout == first.stdout and Checkpoint.open(Path(first.stdout.strip())).spec == replace(SPEC, name="mine")
    missing = converted("acme/other")
    assert missing.returncode == 2 and "no directory 'acme/other', and the Hugging Face hub does not" in missing.stderr


def test_of_a_repository_only_what_is_read_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some keep the same parameters twice. There is no hub here: it would send what its own filter lets through."""
    listed = ["README.md", "config.json", "consolidated.safetensors", "model-00001-of-00001.safetensors",
              "model.safetensors.index.json", "original/model.safetensors", "metal/model.bin", "tokenizer.json"]
    sent: list[str] = []

    def snapshot(repository: str, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        sent.extend(filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError):  # nothing came
        resolve("acme/mine", "float32", tmp_path / "cache")
    assert sent == ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"]


# --------------------------------------------------------------------------------------------------------------------
# Orbax


class Stack(nnx.Module):
    """The modules of SPEC as a user's program holds them: a list of layers, or one module with a leading layer axis."""

    def __init__(self, scanned: bool):
        kind = family("llama")
        self.embed, self.head = kind.embed(SPEC, nnx.Rngs(0)), kind.head(SPEC, nnx.Rngs(0))
        if scanned:
            keys = jax.random.split(jax.random.key(1), SPEC.layers)
            self.layers = nnx.vmap(lambda key: kind.layer(SPEC, "layer", nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List([kind.layer(SPEC, "layer", nnx.Rngs(i)) for i in range(SPEC.layers)])


@pytest.mark.parametrize("scanned", [False, True])
def test_orbax_nnx_state(tmp_path: Path, scanned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rng = directory(tmp_path / "nnx"), np.random.default_rng(1)
    state = nnx.state(nnx.eval_shape(lambda: Stack(scanned)))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), state)
    with ocp.CheckpointManager(path) as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave(jax.tree.map(lambda a: a * (step - 9), state)))
    monkeypatch.chdir(tmp_path)
    opened = Checkpoint.open(resolve(path.name, "float32", tmp_path / "cache"))
    for unit in range(SPEC.units):
        for name, array in opened.read_unit(unit).items():
            kind = unit_kind(SPEC, unit)
            stored = state[kind if kind != "layer" else "layers"]
            if kind == "layer" and not scanned:
                stored = stored[unit]
            stored = np.asarray(stored[name].get_value())
            np.testing.assert_array_equal(array, stored[unit] if kind == "layer" and scanned else stored)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(size, use_bias=False, name=name)(x)
                   for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)))
        return nn.Dense(SPEC.dim, use_bias=False, name="o_proj")(q + (k * v).sum())


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(SPEC.ffn_dim, use_bias=False, name=name)(x) for name in ("gate_proj", "up_proj"))
        return nn.Dense(SPEC.dim, use_bias=False, name="down_proj")(gate * up)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = Attention(name="self_attn")(nn.RMSNorm(name="input_layernorm")(x))
        return MLP(name="mlp")(nn.RMSNorm(name="post_attention_layernorm")(x)), None


class Trunk(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(SPEC.vocab, SPEC.dim, name="embed_tokens")(tokens)
        if self.scanned:
            scan = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=SPEC.layers)
            x, _ = scan(name="layers")(x, None)
        else:
            for i in range(SPEC.layers):
                x, _ = Block(name=f"layers_{i}")(x, None)
        return nn.RMSNorm(name="norm")(x)


class Linen(nn.Module):
    """Llama's parameters under their published names, as a Linen user would have them."""

    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(SPEC.vocab, use_bias=False, name="lm_head")(Trunk(self.scanned, name="model")(tokens))


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def linen(request: pytest.FixtureRequest) -> dict[str, object]:
    init = jax.eval_shape(Linen(request.param).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda a: np.ones(a.shape, np.float32), init)


def test_orbax_linen_params(tmp_path: Path, linen: dict[str, object]) -> None:
    path, named = directory(tmp_path / "linen"), tensors()

    def filled(keys, leaf: np.ndarray) -> np.ndarray:
        words = [key.key for key in keys[1:]]
        layers = range(SPEC.layers) if "layers" in words else [None]

        def one(layer: int | None) -> np.ndarray:
            name = ".".join(words[:-1]).replace("layers_", "layers.")
            array = named[(name if layer is None else name.replace("layers", f"layers.{layer}")) + ".weight"]
            return array.T if words[-1] == "kernel" else array

        return np.stack([one(layer) for layer in layers]) if len(layers) > 1 else one(None)

    params = jax.tree_util.tree_map_with_path(filled, linen)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, params, linen))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "0", params | {"opt_state": {"count": np.zeros((), np.int32)}})
    assert_converted(path, tmp_path / "cache", named)


def test_orbax_mismatches_are_all_named(tmp_path: Path, linen: dict[str, object]) -> None:
    path, params = directory(tmp_path / "linen"), jax.tree.map(np.copy, linen)
    params["params"]["model"]["extra"] = np.zeros(3, np.float32)
    params["params"]["model"]["norm"]["scale"] = np.zeros(5, np.float32)
    del params["params"]["lm_head"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params)
    with pytest.raises(CheckpointError) as caught:
        resolve(str(path), "float32", tmp_path / "cache")
    for text in ("lm_head.weight is missing (head)", "model.extra is unexpected", "model.norm.weight has shape (5,)",
                 "3 problems"):
        assert text in str(caught.value)

"""The examples of one's own decoder, served: the engine's tokens are those of the plain Flax modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import own_models
from blitzjax.config import EngineConfig
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.stages import Stages
from blitzjax.errors import CheckpointError
from blitzjax.models import Family, own
from blitzjax.models.examples import alternating
from blitzjax.types import Sampling, Span

NNX, LINEN = (f"blitzjax.models.examples.{name}:build" for name in ("alternating", "alternating_linen"))
PROMPT = np.random.default_rng(5).integers(0, 256, 70).tolist()  # three chunks, longer than the window


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return own_models.greedy(own_models.filled(seed=1), PROMPT, 12)


def opened(tmp: Path, reference: str, save: Callable[[Path], None]) -> Checkpoint:
    save(tmp / "orbax")
    return Checkpoint.open(resolve(reference, "float32", tmp / "cache", tmp / "orbax"))


def save_nnx(path: Path) -> None:
    own_models.save(own_models.filled(seed=1), path)


def save_linen(path: Path) -> None:
    """The same numbers as a Linen params tree."""
    state = nnx.to_pure_dict(nnx.state(own_models.filled(seed=1)))
    layers = {f"layers_{index}": layer for index, layer in state.pop("layers").items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": state | layers})


def save_scanned(path: Path) -> None:
    """Global and local layers have the same arrays, so that they can be stacked."""
    state = nnx.to_pure_dict(nnx.state(own_models.filled(seed=1)))
    layers = [state["layers"][index] for index in sorted(state["layers"])]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": state | {"layers": jax.tree.map(lambda *a: np.stack(a), *layers)}})


@pytest.mark.parametrize(("reference", "save", "tp"),
                         [(NNX, save_nnx, 1), (NNX, save_scanned, 2), (LINEN, save_linen, 1)],
                         ids=["nnx", "nnx-scanned-tp2", "linen"])
def test_engine_gives_the_tokens_of_the_plain_modules(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                                                      answer: list[int], reference: str, save: Callable[[Path], None],
                                                      tp: int) -> None:
    checkpoint = opened(tmp_path, reference, save)
    store = LayerStore(checkpoint.spec, jax.devices()[:tp])
    for unit in range(checkpoint.spec.units):
        checkpoint.load_unit(unit, store)
    assert served(store, tmp_path_factory, len(answer)) == answer


def test_padding_beyond_the_last_position_changes_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                                                          answer: list[int]) -> None:
    """The last chunk of the prompt is padded to 96 tokens."""
    checkpoint, max_len, table = opened(tmp_path, NNX, save_nnx), 85, "positions.embedding"
    store = LayerStore(replace(checkpoint.spec, max_len=max_len), jax.devices()[:1])
    for unit in range(checkpoint.spec.units):
        arrays = checkpoint.read_unit(unit)
        fill(store, unit, arrays | ({table: arrays[table][:max_len]} if table in arrays else {}))
        store.commit(unit)
    assert served(store, tmp_path_factory, len(answer)) == answer


def served(store: LayerStore, tmp_path_factory: pytest.TempPathFactory, count: int) -> list[int]:
    """The first tokens that the engine answers PROMPT with."""
    config = EngineConfig(dtype="float32", max_model_len=128, max_num_seqs=2, max_num_batched_tokens=32,
                          executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    runner = Runner(Stages(store.spec, config, store.mesh), store)
    prefill = runner.begin(PROMPT)
    runner.run_span(prefill, Span(0, 3))
    runner.run_span(prefill, Span(3, 4))
    tokens = [int(runner.first_token(prefill, Sampling(), 0).tokens[0])]
    cache = SlotCache(runner.stages)
    slot = cache.place("a", prefill.kv)
    while len(tokens) < count:
        cache.reserve(len(PROMPT) + len(tokens))
        step, lengths = np.zeros(cache.batch, np.int32), np.zeros(cache.batch, np.int32)
        step[slot], lengths[slot] = tokens[-1], len(PROMPT) + len(tokens) - 1
        tokens.append(int(runner.decode(cache, step, lengths, greedy_draws(cache.batch)).tokens[slot]))
    return tokens


def test_windows_and_positions_matter(answer: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the tests above would not see them."""
    monkeypatch.setattr(alternating, "WINDOW", 1000)
    assert own_models.greedy(own_models.filled(seed=1), PROMPT, 12) != answer
    monkeypatch.undo()
    moved = own_models.filled(seed=1)
    moved.embed.positions.embedding[...] = moved.embed.positions.embedding[...][::-1]
    assert own_models.greedy(moved, PROMPT, 12) != answer


def test_marked_axes_are_sharded_and_others_are_not() -> None:
    spec, _ = own.load(NNX)
    axes = {info.name: info.axes for info in unit_arrays(spec, 0)}
    assert axes["up.kernel"] == (None, "ffn") and axes["qkv.kernel"] == (None, None)


def test_parameters_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        model = own_models.filled(seed=1)
        model.embed.extra, model.head.norm.scale = nnx.Param(jnp.zeros(2)), nnx.Param(jnp.zeros(3))
        del model.layers[2].out.bias
        own_models.save(model, path)

    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, NNX, save)
    for text in ("embed.extra is unexpected", "head.norm.scale has shape (3,), should be (64,) (head)",
                 "layers.2.out.bias is missing (layer 2)", "3 problems"):
        assert text in str(caught.value)


@pytest.mark.parametrize(("reference", "says"), [
    ("no_such_package.model:build", "ModuleNotFoundError.*no_such_package"),
    ("blitzjax.models.examples.alternating:nothing", "AttributeError.*nothing")])
def test_code_that_does_not_build_is_reported(tmp_path: Path, reference: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        resolve(reference, "float32", tmp_path, tmp_path)


def test_code_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--checkpoint DIR"):
        resolve(NNX, "float32", tmp_path)
    with pytest.raises(CheckpointError, match="has no Orbax checkpoint"):
        resolve(NNX, "float32", tmp_path, tmp_path)


def test_state_besides_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(alternating.Layer):
        def __init__(self, spec, kind, rngs):
            super().__init__(spec, kind, rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    spec, _ = own.load(NNX)
    monkeypatch.setattr(own, "load", lambda reference: (spec, Family(alternating.Embed, Noisy, alternating.Head)))
    with pytest.raises(CheckpointError, match="global holds more than nnx.Param: dropout"):
        unit_arrays(replace(spec, name="noisy"), 0)

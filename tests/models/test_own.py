"""The examples of one's own decoder, served: the engine's tokens are those of the plain Flax modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import own_models
import own_variants
from blitzjax import cli_serve
from blitzjax.config import EngineConfig
from blitzjax.engine import locations
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.orbax_reader import Orbax
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.stages import Stages
from blitzjax.errors import CheckpointError
from blitzjax.models import Family, linen, own
from blitzjax.models.examples import alternating
from blitzjax.types import Sampling, Span

NNX, LINEN = (f"blitzjax.models.examples.{name}:build" for name in ("alternating", "alternating_linen"))
FITTING = "own_variants:fitting"
PROMPT = np.random.default_rng(5).integers(0, 256, 70).tolist()  # three chunks, longer than the window


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return own_models.greedy(own_models.filled(seed=1), PROMPT, 12)


def opened(tmp: Path, reference: str, save: Callable[[Path], None], dtype: str = "float32") -> Checkpoint:
    save(tmp / "orbax")
    return Checkpoint.open(resolve(reference, dtype, tmp / "cache", tmp / "orbax"))


def loaded(checkpoint: Checkpoint, devices: int = 1) -> LayerStore:
    store = LayerStore(checkpoint.spec, jax.devices()[:devices])
    for unit in range(checkpoint.spec.units):
        checkpoint.load_unit(unit, store)
    return store


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
    store = loaded(opened(tmp_path, reference, save), tp)
    assert served(store, tmp_path_factory, len(answer)) == answer


@pytest.mark.parametrize(("tp", "fused_layers"), [(1, 3), (2, 0)])
def test_layers_need_not_attend_nor_heads_have_parameters(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tp: int,
                                                          fused_layers: int) -> None:
    model = own_models.filled(seed=1, build=own_variants.fitting)
    checkpoint = opened(tmp_path, FITTING, lambda path: own_models.save(model, path))
    assert checkpoint.entries[-1] == ()
    assert served(loaded(checkpoint, tp), tmp_path_factory, 12, fused_layers) == own_models.greedy(model, PROMPT, 12)


def test_queries_may_be_bfloat16_where_attention_is_in_cpp(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = own_models.filled(seed=1, build=own_variants.fitting)
    store = loaded(opened(tmp_path, FITTING, lambda path: own_models.save(model, path), "bfloat16"))
    assert len(served(store, tmp_path_factory, 12)) == 12


@pytest.mark.parametrize("nest", [
    lambda params: {"params": params},
    lambda params: train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-3)),
    lambda params: {"params": params, "words": "of somebody", "nothing": None}], ids=["params", "TrainState", "others"])
def test_parameters_are_found_beside_what_else_training_keeps(tmp_path: Path, nest: Callable[[object], object]) -> None:
    """One of a layer's is called `value`, as boxes are."""
    params = nnx.to_pure_dict(nnx.state(own_models.filled(seed=1, build=own_variants.fitting)))
    layers = {f"layers_{index}": layer for index, layer in params.pop("layers").items()}

    def save(path: Path) -> None:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, nest(params | layers))

    found = opened(tmp_path, FITTING, save).read_unit(1)
    np.testing.assert_array_equal(found["value"], layers["layers_1"]["value"])


def test_linen_modules_may_have_layers_of_their_own(tmp_path: Path) -> None:
    spec, family = own_variants.nested()
    units = [family.embed(spec, nnx.Rngs(0)), *(family.layer(spec, "layer", nnx.Rngs(i)) for i in range(spec.layers)),
             family.head(spec, nnx.Rngs(0))]
    embed, *layers, head = (nnx.to_pure_dict(nnx.state(unit)) for unit in units)
    assert "layers_0" in layers[0] and "layers_0" in head
    apart = {f"layers_{i}": layer for i, layer in enumerate(layers)}
    stacked = {"layers": jax.tree.map(lambda *a: np.stack(a), *layers)}
    for name, tree in (("apart", apart), ("stacked", stacked)):
        def save(path: Path, tree: dict[str, object] = tree) -> None:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, {"params": {"embed": embed, "head": head} | tree})

        (tmp_path / name).mkdir()
        found = opened(tmp_path / name, "own_variants:nested", save).read_unit(1)
        np.testing.assert_array_equal(found["layers_0.kernel"], layers[1]["layers_0"]["kernel"])


def test_a_scalar_among_stacked_layers_is_named(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        state = nnx.to_pure_dict(nnx.state(own_models.filled(seed=1)))
        layers = [state["layers"][index] for index in sorted(state["layers"])]
        stack = jax.tree.map(lambda *a: np.stack(a), *layers) | {"gain": np.float32(1)}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": state | {"layers": stack}})

    with pytest.raises(CheckpointError, match="1 problems: layers.gain is unexpected"):
        opened(tmp_path, NNX, save)


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


def stages(store: LayerStore, tmp_path_factory: pytest.TempPathFactory, fused_layers: int = 0) -> Stages:
    config = EngineConfig(dtype=store.spec.dtype, max_model_len=128, max_num_seqs=2, max_num_batched_tokens=32,
                          fused_layers=fused_layers, executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    return Stages(store.spec, config, store.mesh)


def served(store: LayerStore, tmp_path_factory: pytest.TempPathFactory, count: int, fused_layers: int = 0) -> list[int]:
    """The first tokens that the engine answers PROMPT with."""
    runner = Runner(stages(store, tmp_path_factory, fused_layers), store)
    prefill = runner.begin(PROMPT)
    runner.run_span(prefill, Span(0, 3))
    runner.run_span(prefill, Span(3, store.spec.layers))
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
    with pytest.raises(CheckpointError, match="--checkpoint .*nowhere: there is no such directory"):
        resolve(NNX, "float32", tmp_path, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no Orbax checkpoint"):
        resolve(NNX, "float32", tmp_path, tmp_path)
    save_nnx(tmp_path / "step_9" / "weights")
    with pytest.raises(CheckpointError, match="has no Orbax checkpoint.*one of .*step_9/weights"):
        resolve(NNX, "float32", tmp_path, tmp_path)


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it would be of the other one."""
    steps = tmp_path / "orbax"

    def then(change: Callable[[], None]) -> None:
        read = Orbax._restore

        def restore(self: Orbax, numbers: Sequence[int]) -> dict[int, np.ndarray]:
            monkeypatch.setattr(Orbax, "_restore", read)
            arrays = self._restore(numbers)
            change()
            return arrays

        monkeypatch.setattr(Orbax, "_restore", restore)

    def replaced() -> None:
        shutil.rmtree(steps / "9")
        own_models.save(own_models.filled(seed=2), steps / "9")

    then(replaced)
    with pytest.raises(CheckpointError, match="changed while they were read"):
        opened(tmp_path, NNX, lambda path: save_nnx(path / "9"))
    then(lambda: save_nnx(steps / "10"))  # another step changes nothing
    resolve(NNX, "float32", tmp_path / "cache", steps)
    then(lambda: shutil.rmtree(steps / "10"))
    with pytest.raises(CheckpointError, match="10 cannot be read"):
        resolve(NNX, "bfloat16", tmp_path / "cache", steps)


def test_a_name_may_have_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where conversions are kept, each is a directory of its own."""
    spec, family = own.load(NNX)
    monkeypatch.setattr(own, "load", lambda reference: (replace(spec, name="org/mine"), family))
    checkpoint = opened(tmp_path, NNX, save_nnx)
    assert checkpoint.spec.name == "org/mine" and checkpoint.path.parent == locations.models_in(tmp_path / "cache")


def test_what_the_code_prints_is_not_taken_for_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLITZJAX_CACHE", str(tmp_path / "cache"))
    code = Path(alternating.__file__).read_text()
    (tmp_path / "talking.py").write_text(f"{code}import atexit\natexit.register(print, 'bye')\n")
    save_nnx(tmp_path / "orbax")
    assert cli_serve.checkpoint("talking:build", "float32", Path("orbax")).is_relative_to(tmp_path / "cache")


def test_a_linen_head_may_be_without_parameters() -> None:
    class Bare(nn.Module):
        def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
            return x @ table.T

    spec = replace(own.load(NNX)[0], tied_embeddings=True)
    head, x = linen.head(lambda spec: Bare())(spec, nnx.Rngs(0)), jnp.ones((2, spec.dim))
    assert head(x, jnp.ones((spec.vocab, spec.dim))).shape == (2, spec.vocab)


def test_a_unit_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax goes through the whole tree each time: leaf by leaf, 60 layers took minutes."""
    asked, read = [], Orbax._restore
    monkeypatch.setattr(Orbax, "_restore", lambda self, numbers: asked.append(len(numbers)) or read(self, numbers))
    checkpoint = opened(tmp_path, NNX, save_nnx)
    assert asked == [len(entries) for entries in checkpoint.entries]


def test_damaged_metadata_is_said(tmp_path: Path) -> None:
    save_nnx(tmp_path / "orbax")
    (tmp_path / "orbax" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="_METADATA is damaged"):
        resolve(NNX, "float32", tmp_path / "cache", tmp_path / "orbax")


@pytest.mark.parametrize(("build", "says"), [
    ("short", "needs a word for each of 4 layers.*it is global, local"),
    ("one_eos", r"ModelSpec's eos_token_ids must be a tuple of int, got 257$"),
    ("unnamed", "name must be a text that is not empty, got ''; vocab must be an int, at least 1, got '272'$"),
    ("spec_alone", r"spec_alone\(\) must return a ModelSpec and a Family, got ModelSpec"),
    ("called_head", "other than embed and head; it is global, head"),
    ("other_heads", r"global, local: keys are \[1, 32, 4, 16\].*kv_heads, head_dim\], here \[1, 32, 3, 16\]"),
    ("no_table", r"embed: tied_embeddings needs its Param table, of \[272, 64\]"),
    ("of_numpy", "cannot build.*not JSON serializable"),
    ("rounded", r"gives bfloat16\[1, 32, 64\], not float32\[1, 32, 64\]$"),
    ("tuples", "gives a tuple, not float32"),
    ("twice", "calls attend 2 times"),
    ("rematerialised", "calls attend inside jax.checkpoint"),
    ("prompts_only", "ZeroDivisionError"),
    ("learned_scale", "scale, window and softcap of a Scoring are numbers"),
    ("misnamed", r"extra is \[2, 2\], its axes are \('ffn',\)"),
    ("constant", "holds more than nnx.Param: mask")])
def test_modules_that_the_engine_cannot_run_are_refused_before_anything_is_converted(tmp_path: Path, build: str,
                                                                                    says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        resolve(f"own_variants:{build}", "float32", tmp_path, tmp_path)


def test_programs_are_kept_apart_by_what_the_code_computes_wherever_that_comes_from(
        tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str) -> str:
        return stages(LayerStore(replace(own.load(NNX)[0], name=name), jax.devices()[:1]), tmp_path_factory).cache.fingerprint

    assert fingerprint("one") == fingerprint("two")  # names, for modules are kept by them
    monkeypatch.setattr(alternating, "WINDOW", 1000)
    assert fingerprint("one") != fingerprint("three")


def test_programs_are_kept_apart_by_what_the_code_does_at_some_size_alone(monkeypatch: pytest.MonkeyPatch,
                                                                          tmp_path: Path) -> None:
    spec, family = own.load(NNX)

    def fingerprint(name: str, rows: int, width: int) -> str:
        class Looking(alternating.Layer):
            def __call__(self, x, aux, attend):
                return super().__call__(2 * x if x.shape[:2] == (rows, width) else x, aux, attend)

        monkeypatch.setattr(own, "load", lambda reference: (spec, replace(family, layer=Looking)))
        config = EngineConfig(dtype="float32", max_model_len=128, max_num_seqs=4, executable_cache=str(tmp_path))
        mine = replace(spec, name=name)
        return Stages(mine, config, LayerStore(mine, jax.devices()[:1]).mesh).cache.fingerprint

    sizes = ((1, 1), (1, 32), (1, 64), (1, 128), (2, 1), (4, 1))  # nothing is run at the first
    assert len({fingerprint(f"by {size}", *size) for size in sizes}) == len(sizes)


def test_code_that_has_changed_since_it_was_imported_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited.py").write_text("from edited_too import *\n")
    (tmp_path / "edited_too.py").write_text(Path(alternating.__file__).read_text())
    store = LayerStore(own.load("edited:build")[0], jax.devices()[:1])
    stages(store, tmp_path_factory)
    (tmp_path / "edited_too.py").write_text(Path(alternating.__file__).read_text() + "WINDOW = 3\n")
    with pytest.raises(CheckpointError, match="edited_too.py has changed since edited:build was imported here"):
        stages(store, tmp_path_factory)


def test_state_besides_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(alternating.Layer):
        def __init__(self, spec, kind, rngs):
            super().__init__(spec, kind, rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    spec, _ = own.load(NNX)
    monkeypatch.setattr(own, "load", lambda reference: (spec, Family(alternating.Embed, Noisy, alternating.Head)))
    with pytest.raises(CheckpointError, match="global holds more than nnx.Param: dropout"):
        unit_arrays(replace(spec, name="noisy"), 0)

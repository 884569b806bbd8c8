"""Every family computes what transformers computes: whole, in parts, in chunks, sharded (tests/reference/README.md)."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_families
from answering import answer, token_ids, work
from parity import Model, assert_close, residual

from blitzjax.config import EngineConfig
from blitzjax.control.batching import Batcher
from blitzjax.engine.attention import Attention, fused
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, fill, unit_arrays, unit_kind
from blitzjax.engine.rounding import fitted
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.stages import Stages
from blitzjax.models import FAMILIES, family, read_config
from blitzjax.types import Sampling, Span

REFERENCE = Path(__file__).parents[1] / "reference"
CHECKPOINTS = json.loads((REFERENCE / "families.json").read_text())
CHUNK = 16  # tokens, so that the prompt of 27 takes two
PAGE = 4
CONTEXT = 64  # tokens of prompt and answer; what phi3 was first trained on, and phi3_long was not


@functools.cache
def _load(case: str, tp: int, chunk: int, cache: str, attention: Attention | None = None, dtype: str = "float32",
          rounded: bool = False) -> Model:
    """`rounded`: to what int8 has."""
    spec = read_config(CHECKPOINTS[case]["config"], case, dtype)
    found, shapes = family(spec.family), dict(CHECKPOINTS[case]["tensors"])
    store = LayerStore(spec, jax.devices()[:tp])
    for unit in range(spec.units):
        prefix = found.layer_prefix.format(unit) if unit < spec.layers else ""
        published = {}
        for name, shape in found.tensors(spec, unit_kind(spec, unit)).items():
            assert tuple(shapes.pop(prefix + name)) == shape
            published[name] = tiny_families.values(case, prefix + name, shape)
        arrays = found.fuse(spec, unit_kind(spec, unit), published)
        if rounded:
            arrays = fitted(unit_arrays(spec, unit), fitted(unit_arrays(replace(spec, dtype="int8"), unit), arrays))
        fill(store, unit, arrays)
        store.commit(unit)
    assert not shapes, "tensors that nobody reads"
    config = EngineConfig(dtype=dtype, max_model_len=CONTEXT, max_num_seqs=2, max_num_batched_tokens=chunk,
                          executable_cache=cache, native_kernels=False)
    with np.load(REFERENCE / "families.npz") as file:
        expected = {name.split(".")[1]: file[name] for name in file.files if name.startswith(f"{case}.")}
    return Model(Runner(Stages(spec, config, store.mesh, attention), store), expected)


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory):
    cache = str(tmp_path_factory.getbasetemp() / "executables")
    return lambda case, tp=1, chunk=CHUNK, attention=None, **how: _load(case, tp, chunk, cache, attention, **how)


def test_there_is_a_checkpoint_of_every_family() -> None:
    assert {read_config(c["config"], "", "float32").family for c in CHECKPOINTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_parts_and_whole_match_reference(case: str, load) -> None:
    model = load(case)
    runner, expected, layers = model.runner, model.expected, model.runner.spec.layers
    prefill = model.prefill(expected["tokens"])
    assert len(prefill.chunks) == 2
    assert_close(runner.embedded(expected["tokens"].tolist()), expected["embed"])
    runner.run_span(prefill, Span(0, 1))
    assert_close(residual(prefill), expected["layer_0"])
    runner.run_span(prefill, Span(1, layers))
    assert_close(residual(prefill), expected["layers"])
    assert_close(model.logits(jnp.asarray(expected["layers"])), expected["logits"])
    assert_close(model.logits(jnp.asarray(residual(prefill))), expected["logits"])


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_every_split_equals_the_whole_bit_for_bit(case: str, load) -> None:
    model = load(case)
    layers, tokens = model.runner.spec.layers, model.expected["tokens"]
    whole = model.prefill(tokens)
    for index in range(len(whole.chunks)):  # chunk by chunk, the parts layer by layer
        assert list(model.runner.layers_of_chunk(whole, index)) == list(range(layers))
    for cut in range(layers + 1):
        parts = model.prefill(tokens)
        model.runner.run_span(parts, Span(0, cut))
        model.runner.run_span(parts, Span(cut, layers))
        np.testing.assert_array_equal(residual(parts), residual(whole))
        for a, b in zip(jax.tree.leaves(parts.kv), jax.tree.leaves(whole.kv), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_decode_matches_reference(case: str, load) -> None:
    model = load(case)
    runner, expected = model.runner, model.expected
    prefill = model.prefill(expected["tokens"])
    runner.run_span(prefill, Span(0, runner.spec.layers))
    answer, logits = [int(runner.first_token(prefill, Sampling(), 0).tokens[0])], []
    cache = SlotCache(runner.stages)
    slot = cache.place("a", prefill.kv)
    cache.reserve(64)
    take = runner._head

    def head(x: jax.Array, draws: object) -> jax.Array:
        logits.append(model.logits(x[:, 0])[slot])
        return take(x, draws)

    runner._head = head
    for step in range(len(expected["steps"])):
        tokens, lengths = np.zeros(cache.batch, np.int32), np.zeros(cache.batch, np.int32)
        tokens[slot], lengths[slot] = answer[-1], len(expected["tokens"]) + step
        answer.append(int(runner.decode(cache, tokens, lengths, greedy_draws(cache.batch)).tokens[slot]))
    assert answer[:-1] == expected["greedy"].tolist()
    assert_close(np.stack(logits), expected["steps"])


@pytest.mark.parametrize("case", ["gemma3", "gpt_oss"])
def test_fused_layers_of_several_kinds_decode_as_single_ones(case: str, load, tmp_path_factory) -> None:
    """Bit for bit, what they keep of every layer; two layers a program, of three."""
    runner, tokens = load(case).runner, load(case).expected["tokens"].tolist()
    config = EngineConfig(dtype="float32", max_model_len=CONTEXT, max_num_seqs=2, max_num_batched_tokens=CHUNK, fused_layers=2,
                          executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    fused_runner = Runner(Stages(runner.spec, config, runner.store.mesh), runner.store)
    assert len(runner.stages.kinds) == 2 and len(fused_runner.stages.groups) == 2
    caches = []
    for r in (runner, fused_runner):
        prefill = r.begin(tokens)
        r.run_span(prefill, Span(0, r.spec.layers))
        caches.append(SlotCache(r.stages))
        caches[-1].place("a", prefill.kv)
        caches[-1].reserve(64)
        lengths = np.array([len(tokens), 0], np.int32)
        for step in range(3):
            r.decode(caches[-1], np.array([5 + step, 0], np.int32), lengths + np.array([step, 0], np.int32), greedy_draws(2))
    for a, b in zip(*(jax.tree.leaves(c.layers) for c in caches), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_prefix_hits_and_preemption_match_reference(case: str, load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the same prompt where pages suffice for one answer: the second begins behind a hit, gives way, goes on."""
    model, preempted = load(case), []
    expected, store, stages = model.expected, model.runner.store, model.runner.stages
    prompt, greedy = expected["tokens"].tolist(), expected["greedy"].tolist()
    preempt = Batcher.preempt
    monkeypatch.setattr(Batcher, "preempt", lambda self, i, *args: (preempted.append(i), preempt(self, i, *args)))
    pages = -(-(len(prompt) + len(greedy)) // PAGE) + 1
    engine = EngineConfig(max_model_len=CONTEXT, max_num_seqs=2, max_num_batched_tokens=CHUNK, page_size=PAGE,
                          kv_pages=pages, answer_share=0.0)
    sampling = Sampling(max_tokens=len(greedy), ignore_eos=True, logprobs=0)
    said = answer(store, stages, engine, [work(name, prompt, sampling) for name in ("first", "second")])
    assert preempted == ["second"]
    logits = np.concatenate([expected["logits"][-1:], expected["steps"][:-1]])
    wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), expected["greedy"][:, None], 1)[:, 0]
    for name, hit in (("first", 0), ("second", CHUNK)):
        assert token_ids(said[name]) == greedy and said[name][0].cached_tokens == hit
        np.testing.assert_allclose([o.logprobs[0].logprob for o in said[name]], wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_sharded_matches_reference(case: str, tp: int, load) -> None:
    model = load(case, tp, 64)
    prefill = model.prefill(np.append(model.expected["tokens"], model.expected["greedy"]))
    assert len(prefill.chunks) == 1
    model.runner.run_span(prefill, Span(0, model.runner.spec.layers))
    logits = model.logits(jnp.asarray(residual(prefill)))
    assert_close(logits, np.concatenate([model.expected["logits"], model.expected["steps"]]))
    at = len(model.expected["tokens"]) - 1
    assert logits[at:-1].argmax(-1).tolist() == model.expected["greedy"].tolist()


@pytest.mark.parametrize("case, tp", [("llama", 1), ("llama", 2), ("gemma3", 4), ("gpt2", 1), ("qwen2_moe", 1), ("gpt_oss", 2)])
def test_int8_answers_as_bfloat16_of_the_numbers_it_has(case: str, tp: int, load) -> None:
    """Bit for bit: the rest of what is promised of bfloat16 holds of it, too."""
    kept = []
    for how in ({"dtype": "int8"}, {"dtype": "bfloat16", "rounded": True}):
        model = load(case, tp, 64, **how)
        runner, tokens = model.runner, model.expected["tokens"]
        assert any(a.dtype == np.int8 for a in runner.store.params(0).values()) == (how["dtype"] == "int8")
        prefill = model.prefill(tokens)
        runner.run_span(prefill, Span(0, runner.spec.layers))
        rows = [residual(prefill)]
        cache = SlotCache(runner.stages)
        slot = cache.place("a", prefill.kv)
        cache.reserve(64)
        for step in range(3):
            at = [(tokens[step], len(tokens) + step) if row == slot else (0, 0) for row in range(cache.batch)]
            fed, lengths = np.array(at, np.int32).T
            runner.decode(cache, fed, lengths, greedy_draws(cache.batch))
        kept.append([*rows, *map(np.asarray, jax.tree.leaves(cache.layers))])
    for int8, bfloat16 in zip(*kept, strict=True):
        np.testing.assert_array_equal(int8, bfloat16)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_attention_of_gpus_matches_reference(case: str, load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layout of keys and values, and their calls, by XLA: groups, windows, and what does not go through them."""
    def gpus(case: str, tp: int = 1, chunk: int = CHUNK) -> Model:
        return load(case, tp, chunk, fused("xla", "float32"))

    assert gpus(case).runner.stages.attention.fused == "xla" and gpus(case, 2).runner.stages.attention.split is not None
    test_parts_and_whole_match_reference(case, gpus)
    test_decode_matches_reference(case, gpus)
    test_prefix_hits_and_preemption_match_reference(case, gpus, monkeypatch)
    test_sharded_matches_reference(case, 2, gpus)

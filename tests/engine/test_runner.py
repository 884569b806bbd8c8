"""A pass cut anywhere equals the whole, bit for bit; decode continues what prefill began."""

import importlib
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from blitzjax.config import EngineConfig
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.runner import Prefill, Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.shapes import shapes_for
from blitzjax.engine.stages import Stages
from blitzjax.engine.warmup import run_each
from blitzjax.types import ModelSpec, Sampling, Span

SPEC = ModelSpec("tiny", "llama", 5, 64, 4, 2, 16, 128, 272, 512, 10000.0, 1e-5, True, "float32")


def build(tmp_path_factory, tp: int, dtype: str = "float32", fused_layers: int = 0) -> Runner:
    spec = replace(SPEC, dtype=dtype)
    store = LayerStore(spec, jax.local_devices()[:tp])
    rng = np.random.default_rng(0)
    for unit in range(spec.units):
        fill(store, unit, {a.name: rng.normal(1.0 if "norm" in a.name else 0.0, 0.2, a.shape).astype(np.float32)
                           for a in unit_arrays(spec, unit)})
        store.commit(unit)
    config = EngineConfig(dtype=dtype, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64,
                          fused_layers=fused_layers,
                          executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    return Runner(Stages(spec, config, store.mesh), store)


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return build(tmp_path_factory, tp=1)


def prompt(tokens: int) -> list[int]:
    return np.random.default_rng(tokens).integers(0, SPEC.vocab, tokens).tolist()


def same(a, b) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("tokens", [3, 64, 150])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_split_equals_the_whole_bit_for_bit(tmp_path_factory, tokens: int, dtype: str) -> None:
    runner = build(tmp_path_factory, tp=1, dtype=dtype)
    whole = runner.begin(prompt(tokens))
    runner.run_span(whole, Span(0, SPEC.layers))
    for cut in range(SPEC.layers + 1):
        parts = runner.begin(prompt(tokens))
        runner.run_span(parts, Span(0, cut))
        runner.run_span(parts, Span(cut, SPEC.layers))
        assert same(parts.x, whole.x)
        assert all(same(a, b) for a, b in zip(parts.kv, whole.kv, strict=True))


def test_chunk_by_chunk_equals_layer_by_layer(runner: Runner) -> None:
    whole, chunked = runner.begin(prompt(150)), runner.begin(prompt(150))
    runner.run_span(whole, Span(0, SPEC.layers))
    for index in range(len(chunked.chunks)):
        assert list(runner.layers_of_chunk(chunked, index)) == list(range(SPEC.layers))
    assert len(chunked.chunks) == 3 and same(chunked.x, whole.x)
    assert all(same(a, b) for a, b in zip(chunked.kv, whole.kv, strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_every_stage_has_run_before_a_request_needs_it(tmp_path_factory, tp: int) -> None:
    runner = build(tmp_path_factory, tp)
    runner.stages.compile_all()
    runner.stages.compile_moves()
    ran = set()

    class Watched:  # what is compiled, and notes that it ran
        def __init__(self, stage: tuple, compiled) -> None:
            self.stage, self.compiled = stage, compiled

        def __call__(self, *args):
            ran.add(self.stage)
            return self.compiled(*args)

    runner.stages._found = {stage: Watched(stage, found) for stage, found in runner.stages._found.items()}
    before = len(jax.live_arrays())
    run_each(runner.stages)
    assert ran == set(runner.stages._found)
    assert len(jax.live_arrays()) <= before, "nothing of it stays in memory"


def first_token(runner: Runner, prefill: Prefill) -> int:
    return int(runner.first_token(prefill, Sampling(), 0).tokens[0])


def decode_tokens(runner: Runner, tokens: list[int], count: int) -> list[int]:
    """Greedy answer of one sequence by prefill and `count - 1` decode steps."""
    prefill = runner.begin(tokens)
    runner.run_span(prefill, Span(0, SPEC.layers))
    answer = [first_token(runner, prefill)]
    cache = SlotCache(runner.stages)
    slot = cache.place("a", prefill.kv)
    for _ in range(count - 1):
        cache.reserve(len(tokens) + len(answer))
        step, lengths = np.zeros(cache.batch, np.int32), np.zeros(cache.batch, np.int32)
        step[slot], lengths[slot] = answer[-1], len(tokens) + len(answer) - 1
        answer.append(int(runner.decode(cache, step, lengths, greedy_draws(cache.batch)).tokens[slot]))
    return answer


@pytest.mark.parametrize("tokens", [5, 60, 130, 250])
def test_decode_continues_as_prefill_would(runner: Runner, tokens: int) -> None:
    answer = decode_tokens(runner, prompt(tokens), 12)
    for length in range(1, 12):
        again = runner.begin(prompt(tokens) + answer[:length])
        runner.run_span(again, Span(0, SPEC.layers))
        assert first_token(runner, again) == answer[length]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_layers_decode_bit_for_bit_as_single_ones(tmp_path_factory, dtype: str) -> None:
    """Groups of two of five layers: two programs, one of them for the last layer."""
    runners = [build(tmp_path_factory, 1, dtype, fused_layers) for fused_layers in (0, 2)]
    assert [len(r.stages.groups) for r in runners] == [5, 3]
    single, grouped = (sum(kind == "decode" for kind, *_ in r.stages._all()) for r in runners)
    assert grouped == 2 * single
    caches = []
    for runner in runners:
        prefill = runner.begin(prompt(70))
        runner.run_span(prefill, Span(0, SPEC.layers))
        caches.append(SlotCache(runner.stages))
        caches[-1].place("a", prefill.kv)
    tokens = np.array([7, 0], np.int32)
    for step in range(4):
        lengths = np.array([70 + step, 0], np.int32)
        drawn = [r.decode(c, tokens, lengths, r.stages.draws(2, edited=True)) for r, c in zip(runners, caches, strict=True)]
        assert same([drawn[0].details], [drawn[1].details])  # logprobs of the likeliest, to the last bit
        assert all(same(a, b) for a, b in zip(caches[0].layers, caches[1].layers, strict=True))
        tokens = drawn[0].tokens


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sharded_instances_give_the_same_tokens(tmp_path_factory, runner: Runner, tp: int) -> None:
    sharded = build(tmp_path_factory, tp)
    assert decode_tokens(sharded, prompt(70), 10) == decode_tokens(runner, prompt(70), 10)
    whole, parts = sharded.begin(prompt(40)), sharded.begin(prompt(40))
    sharded.run_span(whole, Span(0, SPEC.layers))
    single = runner.begin(prompt(40))
    runner.run_span(single, Span(0, SPEC.layers))
    everything = Sampling(temperature=0.8, seed=4, top_p=0.9, min_p=0.01, repetition_penalty=1.3, logprobs=5)
    drawn = [r.first_token(p, everything, 0).logprobs(0, 5) for r, p in ((sharded, whole), (runner, single))]
    for got, expected in (drawn, (sharded.prompt_logprobs(whole, 3), runner.prompt_logprobs(single, 3))):
        assert [(t.rank, t.top_ids) for t in got] == [(t.rank, t.top_ids) for t in expected]
        np.testing.assert_allclose([t.logprob for t in got], [t.logprob for t in expected], atol=2e-4)
    sharded.run_span(parts, Span(0, 2))
    sharded.run_span(parts, Span(2, SPEC.layers))
    assert same(parts.x, whole.x)


def test_rows_of_a_batch_do_not_disturb_each_other(runner: Runner) -> None:
    """Sequences join and leave the cache, which grows, packs and shrinks; each gets its own answer."""
    prompts = {f"s{n}": prompt(n) for n in (4, 33, 61, 90)}
    expected = {name: decode_tokens(runner, tokens, 8) for name, tokens in prompts.items()}
    cache, answers = SlotCache(runner.stages), {}
    for turn, (name, tokens) in enumerate(prompts.items()):
        prefill = runner.begin(tokens)
        runner.run_span(prefill, Span(0, SPEC.layers))
        answers[name] = [first_token(runner, prefill)]
        cache.place(name, prefill.kv)
        if turn == 2:
            cache.free("s4")
    while any(len(a) < 8 for n, a in answers.items() if n != "s4"):
        step, lengths = np.zeros(cache.batch, np.int32), np.zeros(cache.batch, np.int32)
        for slot, name in enumerate(cache.slots):
            if name is not None:
                step[slot], lengths[slot] = answers[name][-1], len(prompts[name]) + len(answers[name]) - 1
        drawn = runner.decode(cache, step, lengths, greedy_draws(cache.batch))
        for slot, name in enumerate(cache.slots):
            if name is not None:
                answers[name].append(int(drawn.tokens[slot]))
    assert all(answers[name] == expected[name] for name in prompts if name != "s4")


def test_executables_are_loaded_on_the_second_start(tmp_path_factory, runner: Runner) -> None:
    """Also when the process has served a model of another kind before."""
    sys.modules.pop("blitzjax.models.linen", None)
    decode_tokens(runner, prompt(5), 2)
    importlib.import_module("blitzjax.models.linen")
    again = build(tmp_path_factory, tp=1)
    decode_tokens(again, prompt(5), 2)
    assert again.stages.cache.compiled == 0 and again.stages.cache.loaded > 0


@pytest.mark.parametrize("limit,chunk", [(2048, 512), (512, 64), (100, 512), (40, 8)])
def test_every_prompt_fits_compiled_shapes(limit: int, chunk: int) -> None:
    shapes = shapes_for(replace(SPEC, max_len=4096), EngineConfig(max_model_len=limit, max_num_batched_tokens=chunk))
    first, later = set(shapes.first_chunks()), set(shapes.next_chunks())
    for tokens in range(1, limit + 1):
        chunks, context = shapes.chunks(tokens), shapes.staging(tokens)
        assert (chunks[0].width, context) in first
        for hit in range(0, tokens, shapes.hit_tokens):
            chunks = shapes.chunks(tokens, hit)
            assert chunks[0].start == hit and chunks[-1].stop == tokens
            assert all(a.stop == b.start == a.start + a.width for a, b in zip(chunks, chunks[1:]))
            assert all((c.width, context) in later for c in chunks if c.start)
            assert chunks[-1].start + chunks[-1].width <= context
            # Full chunks first, as the batcher hands them out, and no piece is mostly padding but the shortest.
            assert all(c.width == shapes.chunk_tokens for c in chunks if tokens - c.start >= shapes.chunk_tokens)
            assert all(c.width < 2 * (c.stop - c.start) for c in chunks[hit == 0:] if c.width > shapes.widths[0])

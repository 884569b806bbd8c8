"""With the layers in C++, bfloat16 numbers of a token are the same bits in a prompt of any chunks and in a step, for every
family: an answer that is run again after a death, or whose prefix was cached, goes on as it would have.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from answering import answer, token_ids, work
from parity import Model, residual

from blitzjax.config import EngineConfig
from blitzjax.engine import native
from blitzjax.engine.convert import TINY, random_unit
from blitzjax.engine.executables import cpu_features
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, fill
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.stages import Stages
from blitzjax.models import read_config
from blitzjax.types import ModelSpec, Sampling, Span

CHECKPOINTS = json.loads((Path(__file__).parents[1] / "reference" / "families.json").read_text())
TOKENS = np.random.default_rng(0).integers(0, 80, 40)

pytestmark = pytest.mark.skipif(native.best(cpu_features()) is None, reason="the CPU has none of the instruction sets")


def sized(case: str) -> ModelSpec:
    """The family's tiny model with heads of 16 numbers, as registers want them."""
    config = copy.deepcopy(CHECKPOINTS[case]["config"])
    text = config.get("text_config", config)
    for key in ("rope_scaling", "rope_parameters"):
        if "short_factor" in str(text.get(key)):
            del text[key]  # one factor for each pair of the dimensions it had
    if "n_embd" in text:
        text["n_embd"] = 16 * text["n_head"]
    else:
        text["hidden_size"] = 16 * text["num_attention_heads"]
    if text.get("head_dim"):
        text["head_dim"] = 16
    return read_config(config, case, "bfloat16")


def loaded(spec: ModelSpec) -> LayerStore:
    store = LayerStore(spec, jax.devices()[:1])
    for unit in range(spec.units):
        fill(store, unit, random_unit(spec, unit, seed=3))
        store.commit(unit)
    return store


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_prompts_and_steps_give_the_same_bits(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    spec = sized(case)
    store = loaded(spec)

    def model(chunk: int) -> Model:
        config = EngineConfig(dtype="bfloat16", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=chunk,
                              executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
        stages = Stages(spec, config, store.mesh)
        assert stages.attention.kernels is not None, "needs a C++ compiler"
        return Model(Runner(stages, store), {})

    def prompt(model: Model, tokens: np.ndarray):
        prefill = model.prefill(tokens)
        model.runner.run_span(prefill, Span(0, spec.layers))
        return prefill

    short, long = model(16), model(64)
    whole = residual(prompt(long, TOKENS))
    np.testing.assert_array_equal(residual(prompt(short, TOKENS)), whole)

    runner, seen = long.runner, []
    cache = SlotCache(runner.stages)
    other, slot = cache.place("other", prompt(long, TOKENS[5:25]).kv), cache.place("one", prompt(long, TOKENS[:1]).kv)
    cache.reserve(64)
    take = runner._head

    def head(x: jax.Array, draws: object) -> jax.Array:
        seen.append(np.asarray(x).reshape(cache.batch, -1)[slot])
        return take(x, draws)

    runner._head = head
    for at in range(1, len(TOKENS)):
        fed, lengths = np.zeros((2, cache.batch), np.int32)
        fed[[other, slot]], lengths[[other, slot]] = (at, TOKENS[at]), (20 + at // 2, at)
        runner.decode(cache, fed, lengths, greedy_draws(cache.batch))
    np.testing.assert_array_equal(np.stack(seen), whole[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_answers_that_run_again_go_on_as_they_would_have(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """After a death, what an answer has said is part of a prompt, and its neighbours are others."""
    spec = replace(TINY, layers=8, dtype=dtype)
    store = loaded(spec)
    config = EngineConfig(dtype=dtype, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64,
                          executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    stages = Stages(spec, config, store.mesh)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (3, 20, 70, 150, 40, 9, 33)]
    ways = {"greedy": Sampling(max_tokens=80, ignore_eos=True),
            "sampled": Sampling(max_tokens=80, ignore_eos=True, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2)}
    for sampling in ways.values():
        asked = [work(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
        whole = {i: token_ids(said) for i, said in answer(store, stages, config, asked).items()}
        for cut in (1, 16, 17, 60):
            again = [replace(item, attempt=2, generated=tuple(whole[item.request.id][:cut])) for item in asked[cut % 3:]]
            rest = answer(store, stages, config, again)
            assert {i: token_ids(said) for i, said in rest.items()} == {i: whole[i][cut:] for i in rest}

"""What do matrices in int8 save, and cost? Bytes, and the time of decode steps and of a prompt, against bfloat16.

Both dtypes take turns on the engine's own steps, with random weights, which times do not depend on. Ratios are int8's
over bfloat16's, medians over rounds. What SmolLM2-135M makes of some texts tells what rounding costs: nats per token, and
how often its likeliest next token is float32's. Last line: one JSON object.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace

import jax

from bench import figures, prompts
from bench.result import of_rounds
from bench.roofline import MODELS, build, decode_s, prefill_s
from blitzjax.config import EngineConfig
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.params import LayerStore, model_bytes
from blitzjax.engine.runner import Runner
from blitzjax.engine.stages import Stages
from blitzjax.types import DTYPES, Span, TokenLogprob

_MODELS = ("smollm2-135m", "qwen2.5-1.5b")
_BATCHES = (1, 4, 8, 16)
_CONTEXT, _PROMPT = 256, 512  # tokens
_STEPS = 8
_TEXTS, _SEED = 8, 1


def measure(rounds: int) -> dict[str, object]:
    return {"machine": figures.machine(), "rounds": rounds, "quality": _quality(_MODELS[0]),
            **{name: _ratios(name, rounds) for name in _MODELS}}


def _quality(name: str) -> dict[str, dict[str, float]]:
    texts = prompts.of_lengths(prompts.encoder(resolve(name, "float32")), [_CONTEXT] * _TEXTS, _SEED)
    found: dict[str, list[TokenLogprob]] = {}
    for dtype in DTYPES:
        checkpoint = Checkpoint.open(resolve(name, dtype))
        store = LayerStore(checkpoint.spec, jax.local_devices()[:1])
        for unit in range(checkpoint.spec.units):
            checkpoint.load_unit(unit, store)
        runner = Runner(Stages(store.spec, EngineConfig(dtype=dtype, max_model_len=_CONTEXT), store.mesh), store)
        found[dtype] = []
        for text in texts:
            prefill = runner.begin(list(text))
            runner.run_span(prefill, Span(0, runner.spec.layers))
            found[dtype] += runner.prompt_logprobs(prefill, 1)
    return {dtype: figures.rounded_row({
        "nats": -sum(token.logprob for token in said) / len(said),
        "same_likeliest": sum(a.top_ids == b.top_ids for a, b in zip(said, found["float32"], strict=True)) / len(said)})
        for dtype, said in found.items()}


def _ratios(name: str, rounds: int) -> dict[str, float | None]:
    specs = [replace(MODELS[name], dtype=dtype) for dtype in ("int8", "bfloat16")]
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(max_model_len=_PROMPT, max_num_seqs=max(_BATCHES), executable_cache=scratch)
        runners = [build(spec, config) for spec in specs]
        seen = []
        for _ in range(rounds):
            took = [{f"decode_{batch}": decode_s(runner, batch, _CONTEXT, _STEPS) for batch in _BATCHES}
                    | {"prefill": prefill_s(runner, _PROMPT, 1)} for runner in runners]
            seen.append({part: took[0][part] / took[1][part] for part in took[0]})
            print(f"  {name}: " + ", ".join(f"{part} {ratio:.2f}" for part, ratio in seen[-1].items()), flush=True)
    return {"bytes": figures.rounded(model_bytes(specs[0]) / model_bytes(specs[1])), **figures.median_of(seen)}


if __name__ == "__main__":
    sys.exit(of_rounds("int8", __doc__, measure, 5, None))

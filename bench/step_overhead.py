"""What does a decode step cost besides the model? A batch of 32 rows through one tiny layer, where nearly all is overhead.

One engine instance, alone on one core, its tokens encoded and queued as a worker does it. CPU time of whole steps, less
that of the step's three programs, which is measured by calling them one at a time and, in their place, programs that do
nothing: so the runtime's dispatch counts as overhead. Of a round's samples the fastest tenth, of rounds the median; last
line: one JSON object.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled

from bench import figures
from bench.result import of_rounds
from blitzjax.config import Config, EngineConfig
from blitzjax.engine import messages as m
from blitzjax.engine.instance import Instance, Output
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.stages import Stages
from blitzjax.serve.node import encoded
from blitzjax.serve.sessions import Outbox
from blitzjax.types import ModelSpec, Request, Sampling, Work

_SPEC = ModelSpec("tiny", "llama", 1, 32, 2, 1, 16, 64, 272, 512, 10000.0, 1e-5, True, "float32")
_ROWS = 32
_PROMPT, _CONTEXT = 130, 256  # tokens: all steps are in one KV bucket
_MARGIN = 4  # steps at either end in which not every row decodes
_WINDOW = 10  # steps in a sample
_CALLS = 300
_QUIET = 10  # percentile of samples: neighbours on a shared machine only ever add


def measure(rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as cache:
        config = EngineConfig(dtype="float32", max_model_len=_CONTEXT, max_num_seqs=_ROWS, executable_cache=cache)
        store = LayerStore(_SPEC, jax.local_devices()[:1])
        for unit in range(_SPEC.units):
            rng = np.random.default_rng(unit)
            fill(store, unit, {a.name: rng.normal(0.0, 0.2, a.shape).astype(a.dtype) for a in unit_arrays(_SPEC, unit)})
            store.commit(unit)
        stages = Stages(_SPEC, config, store.mesh)
        seen = []
        for k in range(rounds + 1):  # the first warms up
            step_s, wall_s, device_s = *_steps(store, stages, config), _programs(store, stages)
            seen.append({"step_us": step_s * 1e6, "device_us": device_s * 1e6, "overhead_us": (step_s - device_s) * 1e6,
                         "wall_us": wall_s * 1e6})
            print("  round {}: {step_us:.0f} us of CPU a step ({wall_us:.0f} us by the clock), programs alone "
                  "{device_us:.0f}: {overhead_us:.0f} us".format(k, **seen[-1]), flush=True)
    middle = figures.median_of(seen[1:])
    return {**middle, "rows": _ROWS, "rounds": [figures.rounded(row["overhead_us"]) for row in seen[1:]]}


def _steps(store: LayerStore, stages: Stages, config: EngineConfig) -> tuple[float, float]:
    """CPU time and wall time of a step in which every row decodes."""
    outbox, marks = Outbox(), []

    def emit(output: Output) -> None:
        outbox.put(encoded(output))
        if isinstance(output, m.Decoded):
            marks.append((time.process_time(), time.perf_counter()))
        elif isinstance(output, m.Tokens) and output.finish_reason:
            instance.post(m.Stop())

    instance = Instance("one", Config(engine=config), store, stages,
                        None, emit, None, None)  # type: ignore[arg-type]  # nobody to hand anything to
    tokens = _CONTEXT - _PROMPT
    for k in range(_ROWS):
        prompt = tuple(np.random.default_rng(k).integers(8, _SPEC.vocab, _PROMPT).tolist())
        instance.post(Work(Request(f"r{k}", "tiny", _PROMPT, tokens, 0.0), 1, prompt, (), Sampling(max_tokens=tokens)))
    instance.run()
    full = marks[_ROWS + _MARGIN : -_MARGIN]  # prompts begin one after another
    samples = zip(full, full[_WINDOW:], strict=False)
    cpu, wall = zip(*([(y - x) / _WINDOW for x, y in zip(a, b, strict=True)] for a, b in samples), strict=True)
    return figures.percentile(cpu, _QUIET), figures.percentile(wall, _QUIET)


def _programs(store: LayerStore, stages: Stages) -> float:
    """CPU time of embed, the layer and the greedy head, less that of programs that take and give the same and do nothing."""
    group, = stages.groups
    weights, table, top = map(store.params, (0, _SPEC.embed_unit, _SPEC.head_unit))
    tokens, lengths = np.zeros(_ROWS, np.int32), np.full(_ROWS, _PROMPT, np.int32)
    x, aux = stages.embed(table, tokens[:, None], lengths[:, None])
    embedding = (table, tokens[:, None], lengths[:, None])
    greedy = stages.draws(_ROWS, edited=False)
    kv = stages.blank(_ROWS, _CONTEXT)

    def layer() -> Array:
        nonlocal kv
        out, (kv,) = stages.decode(group, [weights], x, aux, [kv], lengths)
        return out

    programs = _each(lambda: stages.embed(*embedding)[0]) + _each(layer) + _each(
        lambda: stages.head(top, table["table"], x, greedy))
    empty_embed = _empty(lambda *_: (jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, aux)), *embedding)
    empty_layer = _empty(lambda weights, x, aux, k, v, lengths: (x + 1, k, v), weights, x, aux, *kv, lengths, donate=(3, 4))
    empty_head = _empty(lambda *_: jnp.zeros(_ROWS, "int32"), top, table["table"], x)

    def nothing() -> Array:
        nonlocal kv
        out, *kv = empty_layer(weights, x, aux, *kv, lengths)
        return out

    return programs - _each(lambda: empty_embed(*embedding)[0]) - _each(nothing) - _each(
        lambda: empty_head(top, table["table"], x))


def _empty(fn: Callable, *args: object, donate: tuple[int, ...] = ()) -> Compiled:
    return jax.jit(fn, donate_argnums=donate, keep_unused=True).lower(*args).compile()


def _each(call: Callable[[], Array]) -> float:
    """CPU time of a call whose result is read, once it is compiled."""
    times = []
    for _ in range(_CALLS):
        began = time.process_time()
        np.asarray(call())
        times.append(time.process_time() - began)
    return figures.percentile(times, _QUIET)


def main(argv: Sequence[str] | None = None) -> int:
    return of_rounds("step_overhead", __doc__, measure, 7, argv)


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before the runtime makes its threads
    sys.exit(main())

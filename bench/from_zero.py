"""How much sooner come first tokens of a model at zero when its first instance is live?

Two workers, SmolLM2-135M and a tiny model that occupies whoever keeps SmolLM2's host copy: its first instance is the
other worker, which gets the parameters over the network. Prompts are sent with the scale command; live, they run behind
the layers that arrive, with live=off they wait for the last one. Rounds of both, side by side; means of a round's
prompts, medians of rounds. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bench import figures, fleet, netns, prompts
from bench.result import say
from blitzjax.cli_serve import checkpoint
from blitzjax.engine.convert import TINY, write_random
from blitzjax.serve.client import Client
from blitzjax.serve.model import load_model
from blitzjax.types import LiveMode

_MODEL, _OTHER = "smollm2-135m", "occupant"
_MODES: tuple[LiveMode, ...] = ("zigzag", "off")
_SEED = 90
_SCALE_S = 60.0


def measure(rounds: int, count: int, tokens: int, link_mbit: int | None) -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    model = load_model(directory)
    asked = prompts.of_lengths(prompts.encoder(directory), [tokens] * count, _SEED)
    tables = {"engine": {"max_model_len": 512, "max_num_seqs": 4, "prefix_caching": False}, "scale": {"min_instances": 0}}
    ttft_s: dict[str, list[float]] = {mode: [] for mode in _MODES}
    answers = set()
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(fleet.scratch()) / _OTHER
        write_random(other, replace(TINY, name=_OTHER), seed=_SEED)
        made = stack.enter_context(fleet.fleet((directory, other), 2, link_mbit, tables))
        client = stack.enter_context(Client(made.address))
        for number in range(rounds + 1):
            for mode in _MODES if number % 2 else _MODES[::-1]:
                mean_s, said = _wake(client, model.name, asked, mode)
                answers.add(said)
                if number:  # the first round warms up
                    ttft_s[mode].append(mean_s)
                    print(f"  {mode}: mean TTFT {mean_s:.3f} s", flush=True)
    medians = {mode: statistics.median(values) for mode, values in ttft_s.items()}
    return {"ttft_ratio": figures.rounded(medians["zigzag"] / medians["off"]), "ttft_s": ttft_s,
            "distinct_answers": len(answers), "prompts": count, "prompt_tokens": tokens, "rounds": rounds}


def _wake(client: Client, model: str, asked: Sequence[prompts.Tokens], mode: LiveMode
          ) -> tuple[float, tuple[object, ...]]:
    """From zero and back. → mean TTFT, answers."""
    _occupy_keeper(client, model)
    with ThreadPoolExecutor(len(asked)) as senders:
        client.scale(1, model=model, live=mode)
        results = list(senders.map(lambda prompt: client.generate(prompt, model=model, max_tokens=4, ignore_eos=True,
                                                                  temperature=0.0), asked))
    for name in (model, _OTHER):
        client.scale(0, model=name, wait=True, timeout_s=_SCALE_S)
    return statistics.mean(r.usage.ttft_s for r in results), tuple(r.token_ids for r in results)


def _occupy_keeper(client: Client, model: str) -> None:
    """The other model is left with one instance, where `model` is kept: an instance that works is not drained."""
    client.scale(2, model=_OTHER, live="off", wait=True, timeout_s=_SCALE_S)
    keeper = next(m.host_copy for m in client.status().models if m.name == model)
    stream = client.stream([1], model=_OTHER, max_tokens=400, ignore_eos=True)
    next(stream)
    busy = next(i.id for i in client.status().instances if i.running)
    if busy != keeper:
        second = client.stream([1], model=_OTHER, max_tokens=400, ignore_eos=True)
        next(second)
        stream.close()
        stream = second
    client.scale(1, model=_OTHER, live="off", wait=True, timeout_s=_SCALE_S)
    stream.close()
    left = next(i.id for i in client.status().instances if i.phase == "serving")
    if left != keeper:
        raise SystemExit(f"{left} is occupied, but {keeper} has the copy: nothing would cross the network. Run it again.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.from_zero", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--link-mbit", type=int, default=1000, help="where links can be limited; 0: not at all")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    reason = netns.missing()
    limited = args.link_mbit if args.link_mbit and not reason else None
    result = measure(1 if args.quick else args.rounds, args.prompts, args.tokens, limited)
    say("from_zero", result | {"link_mbit": limited, "model": _MODEL, "machine": figures.machine()}, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything at once, for as long as you like: requests never stop while instances come and go, processes are killed,
stopped and go on, in an order that the seed chooses, and a second model is deployed, asked and undeployed. Every answer
has the tokens of a single, undisturbed instance.

`BLITZJAX_SOAK_S=600 BLITZJAX_SOAK_SEED=7 bash launch/test.sh -m slow tests/cluster/test_soak.py`, with, say,
`BLITZJAX_SOAK_SET="engine.kv_pages=24 engine.max_num_seqs=3"` for answers that lose their pages and prompts that wait,
and `BLITZJAX_SOAK_FAMILY=gpt_oss` for layers of another kind: any case of tests/reference/families.json. Where there is
no C++, and of families whose heads have 8 numbers there, "engine.dtype=float32".
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import rig as rigs
from rig import POOL, Rig, prompts, written

from blitzjax import config as configs
from blitzjax.engine import hf_config
from blitzjax.engine.convert import TINY
from blitzjax.errors import BlitzError
from blitzjax.serve.local import LocalCluster
from blitzjax.types import ModelSpec


def spec_of(case: str) -> ModelSpec:
    """A spec of the family, as large as the rig's."""
    known = json.loads((Path(__file__).parents[1] / "reference" / "families.json").read_text())[case]["config"]
    same, length = rigs.SPEC, "n_positions" if "n_positions" in known else "max_position_embeddings"
    larger = {"num_hidden_layers": same.layers, "vocab_size": same.vocab, length: same.max_len, "eos_token_id": [257]}
    if "layer_types" in known:
        larger["layer_types"] = [known["layer_types"][k % 2] for k in range(same.layers)]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / hf_config.CONFIG).write_text(json.dumps(known | larger))
        return hf_config.read_spec(Path(directory), same.name, same.dtype)


FAMILY = os.environ.get("BLITZJAX_SOAK_FAMILY")
SPEC = spec_of(FAMILY) if FAMILY else rigs.SPEC
DURATION_S = float(os.environ.get("BLITZJAX_SOAK_S", "120"))
SEED = int(os.environ.get("BLITZJAX_SOAK_SEED", "0")) or random.randrange(1, 1 << 31)
PROMPTS = prompts(24, seed=4, longest=120)
LONGEST, SENDERS = 60, 6
OTHERS = ("controller", "coordinator")
PATIENCE_S = 15.0  # a controller that dies young again and again loses its journal, for that may be what kills it
VISITOR = replace(TINY, name="visitor", layers=5)
SETTINGS = os.environ.get("BLITZJAX_SOAK_SET", "").split()
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
CONFIG = ("serve.port=0", "scale.policy=manual", f"cluster.pool={POOL}", "cluster.threads=1", "engine.dtype=bfloat16",
          "engine.max_model_len=256", "engine.max_num_seqs=8", "engine.max_num_batched_tokens=64", "engine.kv_pages=60",
          "transfer.chunk_bytes=1024", "transfer.collective_timeout_s=3.0", "transfer.handoff_timeout_s=5.0",
          "serve.max_attempts=1000")


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["mixed", "split"])
def test_every_answer_is_right_whatever_happens(roles: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    print(f"seed {SEED}")
    directory, visitor = written(tmp_path_factory, [SPEC, VISITOR])
    config = configs.load(None, (*CONFIG, *SETTINGS, f"scale.roles={roles}",
                                 f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, directory) as cluster:
        cluster.wait_ready(300)
        rig = Rig(cluster)
        asked = [(p, options) for p in PROMPTS for options in ({}, SAMPLED)]
        known = [rig.send(p, max_tokens=LONGEST, **options).result().token_ids for p, options in asked]
        guest = Guest(rig, visitor, least=int(roles == "split"))
        wrong: list[str] = []
        with sending(rig, asked, known, wrong) as answered, guest.coming_and_going(wrong):
            happened = disturb(rig, random.Random(SEED))
        assert not wrong, f"seed {SEED}: {wrong[:3]}, of {len(wrong)}; what happened: {happened[-12:]}"
        print(f"{roles}: {len(answered)} answers, {len(happened)} disturbances, {guest.visits} visits")
        assert len(answered) > 20 and len(happened) > 5 and guest.visits > 0
        least = 1 + (roles == "split")
        rig.scale(least)
        rig.wait(lambda s: sum(i.phase == "serving" for i in s.instances) == least and not s.running_requests
                 and not any(i.pages_used or i.partner for i in s.instances)
                 and sum(i.in_world for i in s.instances) == POOL, "at rest", 90)
        assert [rig.send(p, max_tokens=LONGEST, **options).result().token_ids for p, options in asked] == known
        assert cluster.stop() == 0, cluster.tail("controller")  # the brain's own check


class Guest:
    """The second model. Whether it is there or not, a prompt has the same answer."""

    def __init__(self, rig: Rig, directory: Path, least: int):
        self._rig, self._directory, self._least = rig, directory, least
        self.visits = 0
        self._deploy()
        self._known = self._answers()
        self._undeploy()

    @contextmanager
    def coming_and_going(self, wrong: list[str]) -> Iterator[None]:
        over = threading.Event()

        def visit() -> None:
            while not over.is_set():
                try:
                    self._deploy()
                    if (got := self._answers()) != self._known:
                        wrong.append(f"{VISITOR.name}: {got} for {self._known}")
                    self._undeploy()
                    self.visits += 1
                except Exception as e:
                    wrong.append(f"{VISITOR.name}: {e!r}")
                    return

        thread = threading.Thread(target=visit)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _deploy(self) -> None:
        self._rig.client.deploy(self._directory, min_instances=self._least, max_instances=self._least + 1,
                                timeout_s=120)

    def _undeploy(self) -> None:
        self._rig.client.undeploy(VISITOR.name, timeout_s=120)

    def _answers(self) -> list[tuple[int, ...]]:
        sent = [self._rig.send(prompt, model=VISITOR.name, max_tokens=20, timeout_s=120.0) for prompt in PROMPTS[:8]]
        return [answer.result().token_ids for answer in sent]


@contextmanager
def sending(rig: Rig, asked: list, known: list, wrong: list[str]) -> Iterator[list[int]]:
    """While it lasts, threads ask, and compare."""
    answered: list[int] = []
    over = threading.Event()

    def send(chooser: random.Random) -> None:
        while not over.is_set():
            k, tokens = chooser.randrange(len(asked)), chooser.randint(1, LONGEST)
            prompt, options = asked[k]
            try:
                if chooser.random() < 0.1:
                    stream = rig.client.stream(prompt, max_tokens=tokens, ignore_eos=True, timeout_s=120.0, **options)
                    next(stream)
                    stream.close()  # it was not waited for
                    continue
                options = options | {"max_tokens": tokens, "ignore_eos": True}
                if chooser.random() < 0.1:
                    hurried(rig, prompt, timeout_s=chooser.choice((0.02, 0.3)), **options)
                    continue
                got = asked_in_one_way(rig, chooser, prompt, timeout_s=120.0, **options)
                if got != known[k][:tokens]:
                    wrong.append(f"prompt {k} of {len(prompt)} tokens: {got} for {known[k][:tokens]}")
            except Exception as e:
                wrong.append(f"prompt {k}: {e!r}")
            answered.append(k)

    threads = [threading.Thread(target=send, args=(random.Random(SEED + k),)) for k in range(SENDERS)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join()


def hurried(rig: Rig, prompt: list[int], **options) -> None:
    """Its deadline is the end of it, wherever it is by then, and be it between two controllers, unless it was faster."""
    try:
        rig.client.generate(prompt, **options)
    except BlitzError as e:
        if e.code not in ("DEADLINE_EXCEEDED", "UNAVAILABLE"):
            raise


def asked_in_one_way(rig: Rig, chooser: random.Random, prompt: list[int], **options) -> tuple[int, ...]:
    """What else is asked for changes no token."""
    ways = [{}, {}, {"priority": chooser.randint(-5, 5)}, {"prompt_logprobs": 2, "logprobs": 1}]
    if "seed" in options:
        ways.append({"n": 3})
    answers = rig.client.generate_all(prompt, **options, **(way := chooser.choice(ways)))
    assert len(answers) == way.get("n", 1) and all(len(a.token_ids) == options["max_tokens"] for a in answers)
    if "logprobs" in way:
        assert len(answers[0].prompt_logprobs) == len(prompt) - 1 and len(answers[0].logprobs) == options["max_tokens"]
    return answers[0].token_ids


def disturb(rig: Rig, chooser: random.Random) -> list[str]:
    """For DURATION_S. → what was done. Nothing is left stopped."""
    happened, began, begun_anew = [], time.monotonic(), 0.0
    stopped: dict[int | str, threading.Timer] = {}  # who lets it go on: one's own next call may wait for it
    while (now := time.monotonic() - began) < DURATION_S:
        what = chooser.choices(("scale", "kill", "stop", "controller", "coordinator"), (12, 3, 4, 1.5, 0.5))[0]
        worker: int | str = chooser.randrange(POOL)
        match what:
            case "scale":
                modes = {"live": chooser.choice(("zigzag", "best_effort", "off")),
                         "source": chooser.choice(("multicast", "multicast", "disk"))}
                worker = chooser.randint(1, 3)
                try:
                    for hasty in range(chooser.choice((0, 0, 0, 3))):  # commands that contradict each other
                        rig.scale(1 + hasty % 3, model=SPEC.name, **modes)
                    rig.scale(worker, model=SPEC.name, **modes)
                except Exception as e:  # fewer workers are there than asked for
                    modes = {"refused": str(e)}
                what = f"{what} to {worker} {modes}"
            case "kill":
                rig.cluster.signal_worker(worker)
            case "stop":
                worker, seconds = chooser.choice((*range(POOL), *OTHERS)), chooser.choice((0.3, 2.0, 6.0, 12.0))
                if worker not in stopped or not stopped[worker].is_alive():
                    send_signal(rig, worker, signal.SIGSTOP)
                    stopped[worker] = threading.Timer(seconds, send_signal, (rig, worker, signal.SIGCONT))
                    stopped[worker].start()
                    what = f"{what} for {seconds} s"
            case "controller" if now < begun_anew + PATIENCE_S:
                continue
            case "controller" | "coordinator":
                send_signal(rig, what, signal.SIGKILL)
                begun_anew = now if what == "controller" else begun_anew
        happened.append(f"{now:.1f} {what} {worker}")
        time.sleep(chooser.choice((0.1, 0.5, 1.5, 3.0)))
    for timer in stopped.values():
        timer.join()
    return happened


def send_signal(rig: Rig, process: int | str, number: signal.Signals) -> None:
    match process:
        case "controller":
            rig.cluster.signal_controller(number)
        case "coordinator":
            rig.cluster.signal_coordinator(number)
        case int():
            rig.cluster.signal_worker(process, number)

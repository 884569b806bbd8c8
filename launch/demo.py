"""The main job: serve a real model, send it a burst, scale it out while it works; live against stop-the-world.

Two rounds on one cluster with the same prompts and the same schedule; only the mode of the scale-up differs. Every
number that is printed or drawn was measured in this run. Exit code 1 if a request failed or tokens differ.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from blitzjax import cli_serve
from blitzjax import config as configs
from blitzjax.cli_sim import check_writable
from blitzjax.config import Config
from blitzjax.engine import native
from blitzjax.engine.executables import cpu_features
from blitzjax.errors import BlitzError
from blitzjax.serve.client import Client
from blitzjax.serve.local import LocalCluster
from blitzjax.types import LiveMode
from launch import links, picture, report, view
from launch.burst import Burst, Plan, Round
from launch.prompts import Prompt, prompts

T = TypeVar("T")

MODEL = "smollm2-135m"
MODES: tuple[LiveMode, ...] = ("zigzag", "off")
READY_S = 600.0  # a first run compiles; later ones read the compile cache
JOIN_S = 60.0
_ROOT = Path(__file__).resolve().parents[1]
_LINK_MBIT = 500
_BUSY = 0.5  # load average per core; above it somebody else needs the cores that the demo measures on


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    if min(args.requests, args.max_tokens) < 1 or (args.link_mbit or 0) < 0:
        options.error("--requests and --max-tokens must be at least 1, --link-mbit at least 0")
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end in KeyboardInterrupt and clean up
    try:
        check_writable(args.out)
        return Demo(args, console).run()
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 130
    except (BlitzError, TimeoutError) as e:
        console.print(f"demo: {e}", style="red", markup=False)
        return 1


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="launch/demo.sh", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, default=_ROOT / "demo-out", help="folder of picture, data and logs")
    out.add_argument("--requests", type=int, default=20, help="prompts of the burst (default 20)")
    out.add_argument("--max-tokens", type=int, default=32, help="of each answer (default 32)")
    out.add_argument("--link-mbit", type=int, metavar="RATE", help="Mbit/s of each worker's link (default "
                     f"{_LINK_MBIT} where root, ip and tc are there, so that layers can be seen arriving; 0: loopback)")
    return out


class Demo:
    """One run of the demo."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._console = console
        self._out: Path = args.out
        self._plan = Plan(max_tokens=args.max_tokens)
        self._prompts = prompts(args.requests)
        self._config = config(os.cpu_count() or 1)
        self._rate_mbit = self._link_rate(args.link_mbit)
        self._load = os.getloadavg()[0]
        if self._load > _BUSY * (os.cpu_count() or 1):
            console.print(f"other programs keep this machine busy (load {self._load:.1f}): times will be off",
                          soft_wrap=True)

    def run(self) -> int:
        model = self._show(f"reading the weights of {MODEL} (converted once, then cached)",
                           lambda: cli_serve.checkpoint(MODEL, self._config.engine.dtype))
        rounds: list[Round] = []
        with (links.launch(self._config.cluster.pool, self._rate_mbit, self._out / "logs") as launch,
              LocalCluster(self._config, model, launch) as cluster):
            self._show(f"starting {self._config.cluster.pool} workers, one of them serving (a first run compiles)",
                       lambda: cluster.wait_ready(READY_S))
            with cluster.client() as client:
                self._show("waiting until every worker can take part in a multicast", lambda: wait_pool(client))
                self._show("all prompts to warm up", lambda: warm_up(client, self._prompts))
                for mode in MODES:
                    rounds.append(self._round(client, mode))
                    self._show("scaling down to 1 again", lambda: client.scale(1, wait=True, timeout_s=60.0))
        return self._finish(rounds)

    def _round(self, client: Client, mode: LiveMode) -> Round:
        self._console.rule(f"{len(self._prompts)} prompts, scale 1 → {self._plan.target}: {view.NAMES[mode]}")
        layers = client.status().models[0].layers
        burst = Burst(client, self._prompts, mode, self._plan, layers)
        burst.start()
        view.follow(burst, self._console)
        return burst.finish()

    def _finish(self, rounds: list[Round]) -> int:
        say = self._console.print
        self._console.rule("answers (of the first round)")
        report.print_answers(rounds[0], self._console)
        say()
        say(report.table(rounds))
        say(report.verdict(*rounds), markup=False)
        about = {"model": MODEL, "command": " ".join(sys.argv), "cores": os.cpu_count(), "link_mbit": self._rate_mbit,
                 "load_before": self._load, "config": configs.to_tables(self._config)}
        report.write_json(rounds, about, self._out / "scale_up.json")
        drawn = picture.draw(rounds, self._caption(), self._out)
        say("wrote " + ", ".join(str(p) for p in (*drawn, self._out / "scale_up.json")), markup=False, soft_wrap=True)
        failures = [failure for r in rounds for failure in r.failures]
        for failure in failures:
            say(f"FAILED {failure}", style="red", markup=False)
        return 1 if failures or report.differing(*rounds) else 0

    def _caption(self) -> str:
        link = f"links of {self._rate_mbit} Mbit/s" if self._rate_mbit else "loopback"
        return (f"{MODEL}, {self._config.engine.dtype}, one core per instance of {os.cpu_count()}, {link}; "
                f"{len(self._prompts)} prompts, scale 1 → {self._plan.target} (shaded), one run")

    def _link_rate(self, asked: int | None) -> int:
        if asked == 0:
            return 0
        reason = links.unavailable()
        if reason and asked:
            raise BlitzError(f"cannot limit links here ({reason}); leave out --link-mbit")
        if reason:
            self._console.print(f"workers talk over loopback: links cannot be limited here ({reason})", markup=False,
                                soft_wrap=True)
            return 0
        rate = asked or _LINK_MBIT
        self._console.print(f"workers talk over links of {rate} Mbit/s (network namespaces; --link-mbit 0: loopback)",
                            soft_wrap=True)
        return rate

    def _show(self, what: str, work: Callable[[], T]) -> T:
        """Does `work` in a thread while the seconds are counted; raises what it raises."""
        future: Future[T] = Future()
        began, told = time.monotonic(), 0.0
        threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
        with self._console.status(what) as status:
            while not future.done():
                time.sleep(0.05)
                passed = time.monotonic() - began
                status.update(f"{what}: {passed:.0f} s")
                if not self._console.is_terminal and passed >= told + 10:
                    told = passed
                    self._console.print(f"{what}: {passed:.0f} s so far")
        result = future.result()
        self._console.print(f"{what}: {time.monotonic() - began:.1f} s")
        return result


def config(cores: int) -> Config:
    """One core per instance, and every round runs its prompts: no prefix cache. Tokens must be equal: bfloat16 where an
    answer does not depend on its batch, else float32. The demo itself plays the operator.
    """
    pool = 2 if cores < 3 else 3
    dtype = "bfloat16" if native.best(cpu_features()) and native.compiler() else "float32"
    return configs.load(None, (
        "serve.port=0", f"engine.dtype={dtype}", "engine.max_model_len=768", "engine.max_num_seqs=16",
        "engine.max_num_batched_tokens=512", "engine.prefix_caching=false", "scale.policy=manual",
        f"scale.max_instances={pool}", f"cluster.pool={pool}", "cluster.threads=1", "cluster.pin_cores=true"))


def wait_pool(client: Client) -> None:
    """Returns when every worker is up and has joined the world. Raises TimeoutError."""
    deadline = time.monotonic() + JOIN_S
    while not all(i.in_world for i in client.status().instances):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not every worker joined within {JOIN_S:g} s: {client.status().instances}")
        time.sleep(0.1)


def warm_up(client: Client, asked: Sequence[Prompt]) -> None:
    """Not measured: what the instance touches first, memory for so many answers above all, would count in the first round
    alone.
    """
    with ThreadPoolExecutor(len(asked)) as senders:
        list(senders.map(lambda prompt: client.generate([{"role": "user", "content": prompt.text}], max_tokens=8,
                                                        timeout_s=60.0), asked))


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as e:  # the waiting thread raises it
        future.set_exception(e)


if __name__ == "__main__":
    sys.exit(main())

"""What breaks while it serves: workers die, hang or refuse, the queue fills, the controller is told to go."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from toy import SPEC, TOY_COORDINATOR, eventually, held, toy_config, toy_launch, wait_whole, write_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_frontend import toy

from blitzjax.cli_replay import replay
from blitzjax.errors import BlitzError, InvalidRequest, QueueFull, Unavailable, UnknownModel
from blitzjax.serve import eventlog, pulse
from blitzjax.serve.client import AsyncClient, Client
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch
from blitzjax.commands import Assign
from blitzjax.events import InstanceLost, RequestArrived

SLOW = 0.05
PINGED = "broke: UNAVAILABLE: Stream removed (ping timeout)"  # how the controller's log tells of it


@pytest.fixture
def start(model_dir, tmp_path):
    """Starts clusters with overrides of the configuration; ends them after the test and looks at the exit code."""
    started: list[LocalCluster] = []

    def start(*overrides: str, ready: bool = True, **env: str) -> LocalCluster:
        cluster = LocalCluster(toy_config(*overrides), model_dir, toy_launch(tmp_path / f"run{len(started)}", **env))
        started.append(cluster)
        cluster.start()
        if ready:
            wait_whole(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.stop()


class Background(threading.Thread):
    """One generate call beside the test."""

    def __init__(self, cluster: LocalCluster, prompt, **options):
        super().__init__(daemon=True)
        self._cluster, self._prompt, self._options = cluster, prompt, options
        self.tokens: list[int] = []
        self.last, self.error = None, None
        self.start()

    def run(self):
        try:
            with self._cluster.client() as client:
                for self.last in client.stream(self._prompt, **self._options):
                    self.tokens += self.last.token_ids
        except BlitzError as e:
            self.error = e

    def begun(self) -> bool:
        return bool(self.tokens)


def serving(cluster: LocalCluster) -> set[str]:
    with cluster.client() as client:
        return {i.id for i in client.status().instances if i.phase == "serving"}


def lost(log: Path) -> list[InstanceLost]:
    """So far."""
    return [r.item for r in eventlog.read(log) if isinstance(r.item, InstanceLost)]


def test_answer_survives_its_worker(start, tmp_path):
    log = tmp_path / "events.jsonl"
    cluster = start("scale.min_instances=1", f"serve.event_log={log}")
    victim = int(next(iter(serving(cluster)))[1:])
    with cluster.client() as client:
        client.scale(2, wait=True, timeout_s=300)
    with held(cluster):
        answers = [Background(cluster, [i], max_tokens=40) for i in range(4)]
        eventually(lambda: all(a.begun() for a in answers))
        cluster.signal_worker(victim)
        eventually(lambda: lost(log))
    for answer in answers:
        answer.join(300)
    assert [a.error for a in answers] == [None] * 4
    assert [tuple(a.tokens) for a in answers] == [toy(i, 40) for i in range(4)]
    assert {a.last.usage.attempts for a in answers} <= {1, 2}
    assert max(a.last.usage.attempts for a in answers) == 2
    assert cluster.stop(300) == 0, cluster.tail("controller")
    items = [r.item for r in eventlog.read(log)]
    assert sum(isinstance(i, RequestArrived) for i in items) == 4
    assert [i.instance for i in lost(log)] == [f"i{victim}"]
    assert replay(log).different is None


def test_finished_answer_is_not_run_again_when_its_worker_dies_before_saying_so(start, tmp_path):
    log = tmp_path / "events.jsonl"
    cluster = start("cluster.pool=1", f"serve.event_log={log}", TOY_DIE_AFTER="5")
    with cluster.client() as client:
        assert client.generate([1], max_tokens=4).token_ids == (2, 3, 4, 5)
        eventually(lambda: lost(log))
        eventually(client.ready)
        assert client.generate([1], max_tokens=3).usage.attempts == 1
    assert cluster.stop(300) == 0, cluster.tail("controller")
    assert sum(isinstance(r.item, Assign) for r in eventlog.read(log)) == 2


def test_killed_worker_is_noticed_at_once_and_comes_back(start, tmp_path):
    log = tmp_path / "events.jsonl"
    cluster = start("cluster.pool=1", f"serve.event_log={log}")
    before = cluster.worker_pid(0)
    cluster.signal_worker(0)
    with cluster.client() as client:
        eventually(lambda: lost(log))
        assert PINGED not in cluster.tail("controller")
        eventually(client.ready)
        assert client.generate([1], max_tokens=3).token_ids == (2, 3, 4)
    assert cluster.worker_pid(0) != before


def test_request_without_an_instance_waits_for_one(start, tmp_path):
    log = tmp_path / "events.jsonl"
    cluster = start("cluster.pool=1", f"serve.event_log={log}")
    with held(cluster), cluster.client() as client:  # the next instance does not load before the request is there
        cluster.signal_worker(0)
        eventually(lambda: lost(log))
        waiting = Background(cluster, [1], max_tokens=2)
        eventually(lambda: client.status().queued_requests == 1)
    waiting.join(300)
    assert tuple(waiting.tokens) == (2, 3)


def test_hung_worker_is_lost_to_pings(start):
    cluster = start("cluster.pool=1")
    cluster.signal_worker(0, signal.SIGSTOP)
    with cluster.client() as client:
        eventually(lambda: not client.ready())
        assert PINGED in cluster.tail("controller")
        cluster.signal_worker(0, signal.SIGCONT)
        eventually(client.ready)
        assert client.generate([1], max_tokens=3).token_ids == (2, 3, 4)


def test_full_queue_is_refused(start):
    cluster = start("cluster.pool=1", "engine.max_num_seqs=1", "serve.max_queued_requests=2")
    asked = [Background(cluster, [1], max_tokens=400, temperature=0.5) for _ in range(8)]  # the instance may hold some
    with cluster.client() as client:
        eventually(lambda: any(isinstance(a.error, QueueFull) for a in asked) and client.status().running_requests > 0)
        with pytest.raises(QueueFull):
            client.generate([1])
        before = client.status()
        with pytest.raises(QueueFull, match=r"answer \d of n=4: "):
            client.generate_all([1], n=4, temperature=SLOW)
        eventually(lambda: client.status().queued_requests == before.queued_requests)
        assert client.status().running_requests == before.running_requests
    cluster.stop(0)


def test_sigterm_drains(start):
    cluster = start("serve.shutdown_timeout_s=3600")
    with held(cluster), cluster.client() as client, grpc.insecure_channel(cluster.address) as channel:
        answer = Background(cluster, [1], max_tokens=20)
        eventually(answer.begun)
        health = health_pb2_grpc.HealthStub(channel)
        cluster.terminate()
        eventually(lambda: health.Check(health_pb2.HealthCheckRequest()).status
                   == health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate([1])
    answer.join(300)
    assert tuple(answer.tokens) == toy(1, 20) and answer.error is None
    assert cluster.wait(300) == 0, cluster.tail("controller")


def test_killed_controller_comes_back_and_its_clients_get_the_rest(start, tmp_path):
    """Clients of the next controller go on where they were; so do those whose answers end while there is none."""
    log = tmp_path / "events.jsonl"
    cluster = start(f"serve.event_log={log}")
    with cluster.client() as client:
        client.scale(2, wait=True, timeout_s=300)
    workers = [cluster.worker_pid(k) for k in range(2)]
    answers = [Background(cluster, [i], max_tokens=n, temperature=SLOW) for i, n in enumerate((10, 20, 40, 60, 60))]
    eventually(lambda: all(a.begun() for a in answers))
    cluster.signal_controller()
    for answer in answers:
        answer.join(300)
    assert [a.error for a in answers] == [None] * 5
    assert [tuple(a.tokens) for a in answers] == [toy(i, n) for i, n in enumerate((10, 20, 40, 60, 60))]
    assert {a.last.usage.attempts for a in answers} == {1}
    assert [cluster.worker_pid(k) for k in range(2)] == workers
    assert len(serving(cluster)) == 2
    with cluster.client() as client:
        assert client.generate([1], max_tokens=3).token_ids == (2, 3, 4)
    assert cluster.stop(300) == 0, cluster.tail("controller")
    assert not (cluster.run_dir / "journal").exists()
    assert replay(log).different is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_scale_watch_and_deploy_go_on_with_the_next_controller(start, tmp_path, asynchronous: bool):
    cluster = start("engine.max_num_seqs=1", "cluster.pool=3")
    second = write_model(tmp_path / "second", spec=replace(SPEC, name="second"))
    pictures, ended = [], threading.Event()

    def watch(client: Client) -> None:
        for picture in client.watch(timeout_s=300):
            pictures.append(picture)
            if ended.is_set():
                return

    def call(name: str, *args, **options):
        """Of a new client, so that nothing was learned in earlier calls."""
        if not asynchronous:
            with cluster.client() as client:
                return getattr(client, name)(*args, **options)

        async def run():
            async with AsyncClient(cluster.address) as client:
                return await getattr(client, name)(*args, **options)

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as callers, cluster.client() as watcher:
        watching = callers.submit(watch, watcher)
        eventually(lambda: bool(pictures))
        for k in range(3):
            cluster.signal_worker(k, signal.SIGSTOP)  # nothing gets done until the next controller is there
        calls = [callers.submit(call, "scale", 2, model="toy", wait=True, timeout_s=300),
                 callers.submit(call, "deploy", second, min_instances=1, timeout_s=300)]
        eventually(lambda: [m.target for m in pictures[-1].models] == [2, 1])
        before, dead = len(pictures), cluster.controller_pid()
        cluster.signal_controller()
        eventually(lambda: cluster.controller_pid() != dead)
        for k in range(3):
            cluster.signal_worker(k, signal.SIGCONT)
        scaled, deployed = (c.result(300) for c in calls)
        assert (scaled.serving, scaled.target, deployed.model) == (2, 2, "second")
        eventually(lambda: len(pictures) > before and len(pictures[-1].models) == 2)
        ended.set()
        watching.result(300)
        assert [p.at for p in pictures] == sorted(p.at for p in pictures)
        with pytest.raises(InvalidRequest, match="deployed already"):
            call("deploy", second)

        with held(cluster):
            busy = Background(cluster, [1], max_tokens=100, temperature=SLOW, model="second")
            eventually(busy.begun)
            gone = callers.submit(call, "undeploy", "second", timeout_s=300)
            eventually(lambda: any(m.closing for m in watcher.status().models))
            dead = cluster.controller_pid()
            cluster.signal_controller()
            eventually(lambda: cluster.controller_pid() not in (None, dead))
            assert any(m.closing for m in watcher.status().models)
        gone.result(300)
        busy.join(300)
        assert busy.error is None and len(busy.tokens) == 100
        assert [m.name for m in call("status").models] == ["toy"]
        with pytest.raises(UnknownModel):
            call("undeploy", "second")


def test_waiting_callers_are_told_when_the_server_leaves(start):
    cluster = start("serve.shutdown_timeout_s=1.0")
    with cluster.client() as client, ThreadPoolExecutor(2) as callers:
        for k in range(2):
            cluster.signal_worker(k, signal.SIGSTOP)
        pictures = client.watch()
        next(pictures)  # the server has heard of it
        waiting = [callers.submit(client.scale, 2, wait=True), callers.submit(list, pictures)]
        eventually(lambda: client.status().target_instances == 2)
        cluster.terminate()
        for call in waiting:
            with pytest.raises(Unavailable, match="shut down"):
                call.result(300)


def test_hung_controller_is_replaced(start, monkeypatch, capfd):
    cluster = start("serve.hang_timeout_s=3.0")
    monkeypatch.setattr(cluster._coordinator, "_pulse", None)  # it does not seem to hang
    eventually(lambda: cluster._controller._pulse.answered)  # until then it has longer
    before, workers = cluster.controller_pid(), [cluster.worker_pid(k) for k in range(2)]
    answer = Background(cluster, [1], max_tokens=100, temperature=SLOW)
    eventually(answer.begun)
    cluster.signal_controller(signal.SIGSTOP)
    answer.join(300)
    assert answer.error is None and tuple(answer.tokens) == toy(1, 100) and answer.last.usage.attempts == 1
    eventually(lambda: cluster.controller_pid() not in (None, before))
    assert [cluster.worker_pid(k) for k in range(2)] == workers
    assert "the controller has not answered for 3 s; it is killed" in capfd.readouterr().err


def test_a_controller_that_hangs_before_it_answers_is_replaced(start, monkeypatch, capfd):
    monkeypatch.setattr(pulse, "_MISSED", 3000)
    monkeypatch.setattr(pulse, "_MISSED_STARTING", 15)
    cluster = start("serve.hang_timeout_s=300", ready=False)
    eventually(lambda: cluster.controller_pid() is not None)
    before = cluster.controller_pid()
    cluster.signal_controller(signal.SIGSTOP)
    eventually(lambda: cluster.controller_pid() not in (None, before))
    monkeypatch.setattr(pulse, "_MISSED_STARTING", 3000)
    wait_whole(cluster)
    assert cluster.controller_pid() != before
    assert "the controller has not answered for 1.5 s; it is killed" in capfd.readouterr().err


def test_a_process_that_has_not_answered_yet_has_longer_than_one_that_has(monkeypatch):
    monkeypatch.setattr(pulse, "_MISSED_STARTING", 20)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asking = pulse.Pulse("127.0.0.1:%d" % silent.getsockname()[1], 0.1)
        began = time.monotonic()
        eventually(lambda: asking.hangs() > 0)
        assert time.monotonic() - began > 0.35
    asking.forget()
    assert not asking.hangs()


def test_they_may_be_stopped_for_less_than_the_limit(start, monkeypatch):
    monkeypatch.setattr(pulse, "_MISSED", 300)
    cluster = start("serve.hang_timeout_s=120")
    before = cluster.controller_pid(), cluster.worker_pid(0)
    pulses = cluster._controller._pulse, cluster._coordinator._pulse
    eventually(lambda: all(p.answered for p in pulses))
    for number, noticed in ((signal.SIGSTOP, lambda p: p._missed > 1), (signal.SIGCONT, lambda p: p._missed == 0)):
        cluster.signal_controller(number)
        cluster.signal_coordinator(number)
        eventually(lambda: all(map(noticed, pulses)))
    assert (cluster.controller_pid(), cluster.worker_pid(0)) == before and serving(cluster)


def test_without_a_resume_timeout_a_killed_controller_is_the_end(start):
    cluster = start("serve.resume_timeout_s=0.0")
    with held(cluster):
        answer = Background(cluster, [1], max_tokens=400)
        eventually(answer.begun)
        cluster.signal_controller()
        answer.join(300)
    assert isinstance(answer.error, Unavailable)
    assert cluster.wait(300) == -signal.SIGKILL


def test_drain_has_a_limit_and_a_second_signal_ends_it(start):
    for limit_s, signals in (0.3, 1), (3600.0, 2):
        cluster = start(f"serve.shutdown_timeout_s={limit_s}")
        with held(cluster), cluster.client() as client:
            answers = [Background(cluster, [1], max_tokens=500) for _ in range(20)]
            eventually(lambda: client.status().queued_requests + client.status().running_requests == len(answers))
            for _ in range(signals):
                cluster.terminate()
                eventually(lambda: not client.ready())  # it was heard: two that come together are one
            assert cluster.wait(300) == 0
            for answer in answers:
                answer.join(300)
                assert isinstance(answer.error, Unavailable) and "shut down before" in str(answer.error)


def test_controller_is_unready_until_an_instance_serves(model_dir, tmp_path):
    launch = Launch(run_dir=tmp_path, worker=(sys.executable, "-c", "import signal; signal.pause()"),
                    coordinator=TOY_COORDINATOR)
    with LocalCluster(toy_config(), model_dir, launch) as cluster, grpc.insecure_channel(cluster.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=300)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_controller_says_why_no_worker_can_serve(start):
    cluster = start(ready=False, TOY_REFUSE="weights.bin is truncated; convert the model again")
    with pytest.raises(BlitzError, match="no worker can serve: weights.bin is truncated"):
        cluster.wait_ready(300)
    assert cluster.wait(300) == 1


def test_port_in_use_is_one_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cluster = start(f"serve.port={taken.getsockname()[1]}", ready=False)
        assert cluster.wait(300) == 1
        assert "Address already in use" in cluster.tail("controller")
        assert "Traceback" not in cluster.tail("controller")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_rejoin_after_the_coordination_service_died_or_hung(start, monkeypatch, capfd, how):
    hangs = how is signal.SIGSTOP
    cluster = start(f"serve.hang_timeout_s={1.0 if hangs else 300.0}")
    monkeypatch.setattr(cluster._controller, "_pulse", None)  # it does not seem to hang
    before = [cluster.worker_pid(k) for k in range(2)]
    eventually(lambda: not hangs or cluster._coordinator._pulse.answered)  # else it would have longer
    cluster.signal_coordinator(how)
    eventually(lambda: all(cluster.worker_pid(k) not in (None, before[k]) for k in range(2)))
    monkeypatch.setattr(cluster._coordinator, "_pulse", None)
    cluster.wait_ready(300)
    with cluster.client() as client:
        assert len(client.generate([1, 2, 3], max_tokens=3).token_ids) == 3
    assert ("the coordinator has not answered for 1 s; it is killed" in capfd.readouterr().err) == hangs


def test_no_process_survives_a_killed_parent(model_dir, tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})
from pathlib import Path
from toy import *
cluster = LocalCluster(toy_config(), Path({str(model_dir)!r}), toy_launch(Path({str(tmp_path)!r})))
cluster.start(); cluster.wait_ready(300)
print(cluster.worker_pid(0), cluster.worker_pid(1), cluster.address, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    first, second, address = parent.stdout.readline().split()
    parent.kill()
    parent.wait()

    def gone(pid: str) -> bool:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    eventually(lambda: gone(first) and gone(second))
    assert gone(first) and gone(second)
    with socket.socket() as probe:
        eventually(lambda: probe.connect_ex((address.split(":")[0], int(address.split(":")[1]))) != 0)


def test_worker_that_fails_again_and_again_is_shown(model_dir, tmp_path, capfd):
    launch = Launch(run_dir=tmp_path, worker=(sys.executable, "-c", "print('my cause'); raise SystemExit(3)"),
                    coordinator=TOY_COORDINATOR)
    with LocalCluster(toy_config("cluster.pool=1"), model_dir, launch):
        said: list[str] = []
        eventually(lambda: said.append(capfd.readouterr().err) or "my cause" in "".join(said))
    assert "worker-0 ends again and again (code 3)" in "".join(said)



"""What LocalCluster leaves behind, and what it survives, besides processes that die."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from toy import TOY_COORDINATOR, TOY_WORKER, eventually, toy_config, toy_launch, wait_whole

from blitzjax import cli, cli_serve
from blitzjax import config as configs
from blitzjax.errors import BlitzError, ConfigError, Unavailable, UnknownModel
from blitzjax.serve import processes, pulse
from blitzjax.serve.client import Client
from blitzjax.serve.hosts import Launch, WorkerHost, Workers, across, free_ports
from blitzjax.serve.journal import Journal
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.rundir import RunDir

_LAUNCH = Launch(worker=TOY_WORKER, coordinator=TOY_COORDINATOR)  # in a temporary directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_logs_go_with_a_cluster_that_nothing_happened_to(model_dir: Path, temporary: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as cluster:
        wait_whole(cluster)
        assert cluster.run_dir.parent == temporary and (cluster.run_dir / "worker-0.log").exists()
    assert list(temporary.iterdir()) == []


def test_logs_stay_for_whoever_asks_what_happened(model_dir: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as restarted:
        wait_whole(restarted)
        before = restarted.worker_pid(1)
        restarted.signal_worker(1)
        eventually(lambda: restarted.worker_pid(1) not in (None, before))
    with pytest.raises(ZeroDivisionError), LocalCluster(toy_config(), model_dir, _LAUNCH) as failed:
        1 / 0
    assert restarted.run_dir.exists() and failed.run_dir.exists()


def test_only_their_owner_reads_prompts_and_logs(model_dir: Path, temporary: Path) -> None:
    with LocalCluster(toy_config(), model_dir, toy_launch(temporary / "run")) as cluster:
        wait_whole(cluster)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (cluster.run_dir, *cluster.run_dir.iterdir())}
    assert modes.pop("run") == 0o700 and {"journal", "controller.log", "worker-0.log"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_prompts_of_a_killed_supervisor_go_with_the_next_start(temporary: Path) -> None:
    live, dead, open_still = RunDir(None), temporary / "blitzjax-dead", temporary / "blitzjax-0"
    dead.mkdir()
    open_still.mkdir()
    (elsewhere := temporary / "elsewhere").mkdir()
    (temporary / "blitzjax-link").symlink_to(elsewhere)
    for directory in (live.path, dead, elsewhere):
        for name in ("journal", "journal.unusable", "worker-0.log"):
            (directory / name).touch()
    controller = Journal(open_still / "journal", {"id": "x"})
    RunDir(None)
    assert (open_still / "journal").exists()
    controller.discard()
    assert [path.name for path in dead.iterdir()] == ["worker-0.log"], "logs stay for whoever asks"
    assert len(list(live.path.iterdir())) == len(list(elsewhere.iterdir())) == 3
    path = live.path
    del live
    RunDir(None)
    assert [p.name for p in path.iterdir()] == ["worker-0.log"]


def test_what_is_killed_starts_again_where_nothing_can_be_written(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what the supervisor says, nor what they say themselves."""
    [port] = free_ports(1)
    launch = replace(_LAUNCH, coordinator=Launch().coordinator)
    with LocalCluster(toy_config(f"serve.http_port={port}"), model_dir, launch) as cluster, cluster.client() as client:
        wait_whole(cluster)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Full(), line_buffering=True))
        for process in (cluster._controller, cluster._coordinator, *cluster._gateway):
            process.log, lives = Path("/dev/full"), process.lives
            process.signal(signal.SIGKILL)
            eventually(lambda: process.lives > lives)
        wait_whole(cluster)
        eventually(lambda: reached(port))
        assert client.generate("a", max_tokens=2).text == "bc"
        assert [p.lives for p in (cluster._controller, cluster._coordinator, *cluster._gateway)] == [2, 2, 2]


class Full(io.BytesIO):
    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, "no space left")


def reached(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").status == 200
    except OSError:
        return False


def test_a_controller_that_dies_as_it_is_ready_ends_no_cluster(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was to say the names of its models then."""
    def banner(cluster: LocalCluster) -> str:
        cluster._controller.signal(signal.SIGKILL)
        thread.submit(end, cluster)
        raise Unavailable("nobody is there")

    def end(cluster: LocalCluster) -> None:
        eventually(lambda: cluster._controller.lives == 2 or cluster._controller.ended.is_set())
        cluster.terminate()

    monkeypatch.setattr(cli_serve, "Launch", lambda: _LAUNCH)
    monkeypatch.setattr(cli_serve, "checkpoint", lambda *args: model_dir)
    monkeypatch.setattr(cli_serve, "banner", banner)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        with ThreadPoolExecutor(1) as thread:
            assert cli.main(["serve", "toy", "--port", "0", "--pool", "1"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_cluster_outlives_its_directory(model_dir: Path, temporary: Path) -> None:
    """What cleans temporary files away after some days must not end it."""
    with LocalCluster(toy_config(), model_dir, toy_launch(temporary / "run")) as cluster, cluster.client() as client:
        wait_whole(cluster)
        shutil.rmtree(cluster.run_dir)
        before = cluster.worker_pid(0)
        cluster.signal_worker(0)
        eventually(lambda: cluster.worker_pid(0) not in (None, before))
        wait_whole(cluster)
        assert len(client.generate([1, 2, 3], max_tokens=3).token_ids) == 3


def test_told_to_go_before_it_began_it_goes(model_dir: Path) -> None:
    cluster = LocalCluster(toy_config(), model_dir, _LAUNCH)
    cluster.terminate()
    with cluster:
        cluster.wait(300)
        assert cluster.controller_pid() is None


def test_told_to_go_while_it_begins_it_goes(model_dir: Path, temporary: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as cluster:
        eventually(lambda: cluster.controller_pid() is not None)
        cluster.terminate()
        assert cluster.wait(300) == 0
    assert list(temporary.iterdir()) == []


def looked(process: processes.Process) -> processes.Process:
    process.kill_if_hung()
    return process


def test_a_life_in_which_nothing_worked_is_a_short_one_however_long(temporary: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    monkeypatch.setattr(processes, "_HEALTHY_S", 0.0)
    monkeypatch.setattr(pulse, "_MISSED_STARTING", 2)
    process = processes.Process("sleeper", ("sleep", "600"), dict(os.environ), temporary / "log",
                                pulse.Pulse("127.0.0.1:1", 0.2))
    for worked, short in ((False, 1), (False, 2), (True, 0)):
        process._due = 0.0
        process.start_when_due()
        if worked:
            process.kill()
        else:
            eventually(lambda: looked(process).poll())
        assert process.short_lives == short


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_an_ipv6_address_is_a_host_like_any_other(model_dir: Path) -> None:
    ports = free_ports(2)
    config = toy_config('serve.host="::1"', f"serve.http_port={ports[0]}", f"serve.metrics_port={ports[1]}")

    def get(port: int, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://[::1]:{port}{path}", timeout=300) as answer:
                return answer.status
        except urllib.error.URLError:
            return 0

    with LocalCluster(config, model_dir, _LAUNCH) as cluster:
        assert cluster.address.startswith("[::1]:")
        wait_whole(cluster)
        with Client(cluster.address) as client:
            assert client.generate("a", max_tokens=2).text == "bc"
        eventually(lambda: get(ports[0], "/v1/models") == 200)
        assert get(ports[1], "/metrics") == 200


def test_workers_of_an_ipv6_host_are_written_with_brackets(tmp_path: Path) -> None:
    config = configs.load(None, ("cluster.pool=2", "cluster.base_port=6400"))
    launch = across(config, ("::1", "127.0.0.1"), 0)
    workers = Workers(config, replace(launch, run_dir=tmp_path), launch.ports)
    assert (workers.coordinator, workers.addresses) == ("[::1]:6400", ("[::1]:6401", "127.0.0.1:6401"))
    with pytest.raises(ConfigError, match="without brackets, as in ::1"):
        configs.load(None, ('serve.host="[::1]"',))


def test_a_machine_that_waits_for_the_first_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    [port] = free_ports(1)
    config = configs.load(None, ("cluster.pool=2", f"cluster.base_port={port}"))
    host = WorkerHost(config, replace(across(config, ("127.0.0.1", "127.0.0.2"), 1), worker=TOY_WORKER))

    async def next_line() -> str:
        said = ""
        while not said.endswith("\n"):
            await asyncio.sleep(0.02)
            said += capsys.readouterr().err
        return said

    async def wait() -> tuple[str, str]:
        async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
            tasks.create_task(host.run())
            waiting = await next_line()
            with socket.create_server(("127.0.0.1", port)):
                answers = await next_line()
            host.stop()
        return waiting, answers

    waiting, answers = asyncio.run(wait())
    assert f"waiting for 127.0.0.1:{port}: the same command must run there, with --host-index 0" in waiting
    assert f"127.0.0.1:{port} answers now" in answers


def test_one_checkpoint_under_two_names(model_dir: Path) -> None:
    with LocalCluster(toy_config(), [model_dir] * 2, _LAUNCH, ("chat", "base")) as cluster, cluster.client() as client:
        wait_whole(cluster)
        assert [m.name for m in client.status().models] == ["chat", "base"]
        assert [client.generate("a", model=name, max_tokens=2).text for name in ("chat", "base")] == ["bc", "bc"]
        with pytest.raises(UnknownModel, match="served: chat, base"):
            client.generate("a", model="toy")


@pytest.mark.parametrize(("names", "roles", "target", "says"), [
    (["chat"], "mixed", 1, r"0 of the pool's 2 workers have joined so far, not i0 at 127.0.0.1:\d+, i1 at 127.0.0.1:\d+; got"),
    (["chat", "base"], "mixed", 2, r"in \[1, 1\]: the pool has 2 workers, 1 of them promised to base; got 2"),
    (["chat"], "split", 1, r"in \[2, 2\]: the pool has 2 workers, split roles need 2; got 1")])
def test_a_target_that_cannot_be_had_is_refused_with_the_reason(names: list[str], roles: str, target: int, says: str,
                                                               model_dir: Path) -> None:
    config = toy_config(f"scale.roles={roles}")
    with LocalCluster(config, [model_dir] * len(names), replace(_LAUNCH, worker=("false",)), names) as cluster:
        with cluster.client() as client:
            eventually(lambda: listens(client))
            assert [text.partition(" ")[0] for text in client.status().awaited] == ["i0", "i1"]
            with pytest.raises(BlitzError, match=says):
                client.scale(target, model="chat", wait=True, timeout_s=300)


def listens(client: Client) -> bool:
    try:
        return bool(client.status().models)
    except Unavailable:
        return False


def test_the_coordination_service_answers_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_MISSED_STARTING", 6000)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    asking = pulse.Pulse(address, 1.0)
    service = processes.Process("coordinator", (*Launch().coordinator, "--address", address, "--size", "1"),
                                dict(os.environ), tmp_path / "log", asking)
    service.start_when_due()
    eventually(lambda: looked(service) and asking.answered)
    assert not service.poll()
    service.signal(signal.SIGSTOP)
    eventually(lambda: looked(service).poll())
    assert service.code == -signal.SIGKILL

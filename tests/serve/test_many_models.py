"""Several toy models through the real controller: by name, from zero, deployed and undeployed, over two workers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from test_frontend import LASTING
from toy import SPEC, eventually, toy_config, toy_launch, write_model

from blitzjax import cli, cli_serve
from blitzjax.errors import BlitzError, InvalidRequest, UnknownModel
from blitzjax.serve.client import Client
from blitzjax.serve.local import LocalCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    root = tmp_path_factory.mktemp("many")
    models = [write_model(root / f"{name}.d", spec=replace(SPEC, name=name, layers=layers))
              for name, layers in (("left", 4), ("right", 30))]
    config = toy_config("scale.policy=auto", "scale.min_instances=0", "scale.zero_after_s=0.5",
                        "scale.down_after_s=600",  # so long the policy leaves a wish alone
                        "scale.max_instances=2", "engine.dtype=float32")
    with LocalCluster(config, models, toy_launch(root / "run")) as cluster:
        cluster.wait_ready(300)
        with cluster.client() as client:
            eventually(lambda: len(kept(client)) == 2)
        yield cluster
        assert cluster.stop(300) == 0, cluster.tail("controller")


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


def kept(client: Client) -> dict[str, str]:
    """Model → the worker with its whole host copy."""
    return {m.name: m.host_copy for m in client.status().models if m.host_copy and not m.copying}


def blitzjax(cluster: LocalCluster, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blitzjax.cli", *argv, "--address", cluster.address],
                          capture_output=True, text=True, timeout=300)


def test_the_banner_has_the_names_that_clients_use(cluster: LocalCluster) -> None:
    assert f"is ready: left, right on {cluster.address}" in cli_serve.banner(cluster)


def test_models_at_zero_are_kept_by_different_workers_and_answer(client: Client) -> None:
    eventually(lambda: len(kept(client)) == 2)
    assert len(set(kept(client).values())) == 2
    eventually(client.ready)
    for name in ("left", "right", ""):
        assert client.generate("a", model=name, max_tokens=4).text == "bcde"
    eventually(lambda: len(kept(client)) == 2)
    assert all(i.phase == "idle" for i in client.status().instances)


def test_a_waiting_caller_sees_what_it_waits_for(client: Client) -> None:
    eventually(lambda: len(kept(client)) == 2)
    chunks = list(client.stream("a", model="right", max_tokens=3, progress=True))
    first, *others = chunks
    assert first.progress.layers == 30 and first.progress.serving == 0 and not first.text
    assert "".join(chunk.text for chunk in others) == "bcd"
    assert client.generate("a", model="right", max_tokens=3, progress=True).text == "bcd"
    assert all(chunk.progress is None for chunk in client.stream("a", model="right", max_tokens=3))


def test_a_model_comes_and_goes_while_others_serve(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    third = write_model(tmp_path / "third", spec=replace(SPEC, name="third", layers=3))
    done = blitzjax(cluster, "deploy", str(third), "--instances", "1")
    assert done.returncode == 0 and done.stdout.startswith("third is deployed after"), done.stderr
    with pytest.raises(InvalidRequest, match="deployed already"):
        client.deploy(third)
    eventually(lambda: any(i.model == "third" and i.phase == "serving" for i in client.status().instances))
    assert client.generate("x", model="third", max_tokens=2).text == "yz"
    assert re.search(r"third( \(keeps \w+\))? 3/3", blitzjax(cluster, "status").stdout)
    assert blitzjax(cluster, "undeploy", "third").returncode == 0
    with pytest.raises(UnknownModel):
        client.generate("x", model="third")
    assert [m.name for m in client.status().models] == ["left", "right"]
    assert not any(i.model == "third" or "third" in i.copies for i in client.status().instances)


def test_a_model_is_deployed_in_the_clusters_dtype_under_the_name_that_is_asked_for(
        cluster: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be converted is already: the toy has no parameters."""
    directory, dtypes = write_model(tmp_path / "toy"), []
    monkeypatch.setattr(cli_serve, "checkpoint", lambda model, dtype, source: dtypes.append(dtype) or directory)
    command = ["deploy", str(directory), "--address", cluster.address, "--instances", "0"]
    assert cli.main([*command, "--served-model-name", "fourth"]) == 0
    assert client.generate("x", model="fourth", max_tokens=2).text == "yz"
    client.undeploy("fourth", timeout_s=300)
    assert cli.main([*command, "--dtype", "int8"]) == 0
    assert client.generate("x", model="toy", max_tokens=2).text == "yz"
    assert dtypes == ["float32", "int8"]
    client.undeploy("toy", timeout_s=300)


@pytest.mark.parametrize("model", ["left.d", "left", "someone/left", "other --served-model-name left"])
def test_a_name_that_is_taken_is_refused_before_anything_is_converted(
        model: str, cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a manifest, of a directory to convert, of a repository, or one that is given."""
    write_model(tmp_path / "left.d", spec=replace(SPEC, name="left"))
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_serve, "checkpoint", None)
    assert cli.main(["deploy", *model.split(), "--address", cluster.address]) == 2
    assert "a model named 'left' is deployed already; give this one another --served-model-name" in capsys.readouterr().err
    if "name" not in model:
        assert cli.main(["serve", model, "left.d"]) == 2
        assert "2 models would be called 'left'; give each its own" in capsys.readouterr().err


def test_a_scale_up_that_does_not_come_says_what_is_instead(cluster: LocalCluster, client: Client, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    client.deploy(write_model(tmp_path / "third"), served_model_name="third")
    streams = [client.stream("a", model=name, **LASTING) for name in ("left", "right")]
    for stream in streams:
        next(stream)  # no worker is free
    assert cli.main(["scale", "--to", "1", "--model", "third", "--address", cluster.address, "--timeout-s", "0.5"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"0 instead of 1 instances serve after 0.5 s, and the change goes on; .*i\d serving (left|right)", said)
    client.undeploy("third", timeout_s=300)
    for stream in streams:
        stream.close()


def test_whoever_waits_for_instances_of_a_model_that_leaves_is_told(client: Client, tmp_path: Path) -> None:
    client.deploy(write_model(tmp_path / "third", spec=replace(SPEC, name="third")))
    streams = [client.stream("a", model=name, **LASTING) for name in ("left", "right")]
    for stream in streams:
        next(stream)  # no worker is free
    with ThreadPoolExecutor(1) as callers:
        waiting = callers.submit(client.scale, 1, model="third", wait=True, timeout_s=300)
        eventually(lambda: any(m.name == "third" and m.target == 1 for m in client.status().models))
        client.undeploy("third", timeout_s=300)
        with pytest.raises(BlitzError, match="ABORTED: third was undeployed"):
            waiting.result()
    for stream in streams:
        stream.close()


def test_what_cannot_be_deployed_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(BlitzError, match="not a blitzjax checkpoint"):
        client.deploy(tmp_path)
    manifest = write_model(tmp_path / "old", spec=replace(SPEC, name="old")) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": ', '"version": 1'))
    with pytest.raises(BlitzError, match="format version 1.*convert the model again"):
        client.deploy(manifest.parent)
    greedy = write_model(tmp_path / "greedy", spec=replace(SPEC, name="greedy"))
    with pytest.raises(InvalidRequest, match="min_instances 3 does not fit"):
        client.deploy(greedy, min_instances=3, max_instances=3)
    with pytest.raises(InvalidRequest, match="0 <= min"):
        client.deploy(greedy, min_instances=2, max_instances=1)
    with pytest.raises(UnknownModel):
        client.undeploy("greedy")
    with pytest.raises(InvalidRequest, match="say which model to undeploy: left, right"):
        client.undeploy("")


def test_a_killed_keeper_is_replaced(cluster: LocalCluster, client: Client) -> None:
    eventually(lambda: len(kept(client)) == 2)
    victim = kept(client)["left"]
    cluster.signal_worker(int(victim[1:]))
    eventually(lambda: kept(client).get("left", victim) != victim)
    assert client.generate("a", model="left", max_tokens=3).text == "bcd"
    eventually(lambda: len(client.status().instances) == 2 and len(kept(client)) == 2)


def test_scaling_is_about_one_model(client: Client) -> None:
    """The last one: after it, a model that is woken stays."""
    with pytest.raises(InvalidRequest, match="say which model to scale: left, right"):
        client.scale(1)
    with pytest.raises(InvalidRequest, match=r"in \[0, 2\]"):
        client.scale(3, model="left")
    with pytest.raises(UnknownModel, match="no model 'middle' here; served: left, right"):
        client.scale(1, model="middle")
    reply = client.scale(2, model="right", wait=True, timeout_s=300)
    assert (reply.serving, reply.target) == (2, 2)
    assert client.scale(0, model="right", wait=True, timeout_s=300).serving == 0
    eventually(lambda: len(kept(client)) == 2)

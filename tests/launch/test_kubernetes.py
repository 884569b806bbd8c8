"""The manifest says what our own command and server understand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from blitzjax import cli, cli_serve
from blitzjax.config import Config
from blitzjax.serve.hosts import across

MANIFEST = Path(__file__).resolve().parents[2] / "launch" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def documents() -> dict[tuple[str, str], dict]:
    read = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {(one["kind"], one["metadata"]["name"]): one for one in read}


@pytest.fixture(scope="module")
def hosts(documents) -> dict:
    return documents["StatefulSet", "blitzjax"]["spec"]


@pytest.fixture(scope="module")
def pod(hosts) -> dict:
    return hosts["template"]["spec"]


def command(pod: dict, index: int) -> tuple[list[str], Config]:
    """The names in --hosts and the configuration of the pod with this index."""
    [container] = pod["containers"]
    assert container["command"][0] == "blitzjax"
    known = {variable["name"]: variable for variable in container["env"]}
    assert known["POD_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    argv = [text.replace("$(POD_INDEX)", str(index)) for text in (*container["command"][1:], *container["args"])]
    args = cli.build_parser().parse_args(argv)
    names = args.hosts.split(",")
    assert args.host_index == index
    return names, cli_serve.configure(args, len(args.model), len(names))


def test_every_pod_knows_its_part_of_the_pool(hosts, pod, capsys) -> None:
    launches = [across(config, names, k) for k in range(hosts["replicas"]) for names, config in [command(pod, k)]]
    assert "cannot resolve blitzjax-1" in capsys.readouterr().err  # as in a pod that is earlier than another
    assert [k for launch in launches for k in launch.here] == list(range(command(pod, 0)[1].cluster.pool))
    assert launches[0].hosts[launches[1].here[0]] == "blitzjax-1.blitzjax-hosts"


def test_names_ports_and_labels_agree(documents, hosts, pod) -> None:
    names, config = command(pod, 0)
    service = documents["Service", hosts["serviceName"]]["spec"]
    assert names == [f"blitzjax-{k}.{hosts['serviceName']}" for k in range(hosts["replicas"])]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    labels = hosts["template"]["metadata"]["labels"]
    assert service["selector"] == hosts["selector"]["matchLabels"] == labels
    [container] = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    serve = config.serve
    assert ports == {"grpc": serve.port, "http": serve.http_port, "metrics": serve.metrics_port}
    assert hosts["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(serve.metrics_port)
    for_clients = documents["Service", "blitzjax"]["spec"]
    assert for_clients["selector"].items() >= labels.items()
    assert {port["name"]: port["port"] for port in for_clients["ports"]}.items() <= ports.items()
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        claim["metadata"]["name"] for claim in hosts["volumeClaimTemplates"]}


def test_probes_and_times_agree(pod) -> None:
    """That these paths answer, on every host, tests/cluster/test_several_hosts.py finds out."""
    config = command(pod, 0)[1]
    [container] = pod["containers"]
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    asked = re.findall(r"httpGet: {path: (\S+), port: metrics}", MANIFEST.read_text())
    assert sorted(probe["httpGet"]["path"] for probe in probes.values()) == sorted(asked) and len(probes) == 3
    liveness = probes["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > config.serve.hang_timeout_s + 30
    assert pod["terminationGracePeriodSeconds"] > config.serve.shutdown_timeout_s + 5

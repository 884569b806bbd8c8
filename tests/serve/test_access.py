"""A cluster with a key and a certificate, called from outside. tls/cert.pem is self-signed for localhost, until 2125:

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj "/CN=blitzjax test" \
    -addext "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1" -keyout key.pem -out cert.pem
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from toy import eventually, toy_config, toy_launch, wait_whole

from blitzjax import cli
from blitzjax.errors import ConfigError, Unauthenticated, Unavailable
from blitzjax.serve import access
from blitzjax.serve.client import AsyncClient, Client
from blitzjax.serve.hosts import free_ports
from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import vllm_engine_pb2 as vllm
from blitzjax.v1 import vllm_engine_pb2_grpc as vllm_rpc

CERT, KEY = (Path(__file__).parent / "tls" / name for name in ("cert.pem", "key.pem"))


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    [port] = free_ports(1)
    config = toy_config(f"serve.http_port={port}", f'serve.ssl_certfile="{CERT}"', f'serve.ssl_keyfile="{KEY}"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(access.KEY_VARIABLE, "secret")
        with LocalCluster(config, model_dir, toy_launch(tmp_path_factory.mktemp("run"))) as cluster:
            wait_whole(cluster)
            patch.delenv(access.KEY_VARIABLE)
            yield cluster
            assert cluster.stop(300) == 0, cluster.tail("controller")


def blitzjax(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "blitzjax.cli", *argv], capture_output=True, text=True, timeout=300,
                          env=os.environ | env)


def test_over_tls_with_the_key_it_answers(guarded: LocalCluster) -> None:
    with Client(guarded.address, api_key="secret", cacert=CERT) as client:
        assert client.generate("a", max_tokens=3).text == "bcd"
        assert next(client.watch()).models[0].name == "toy"

    async def answer() -> str:
        async with AsyncClient(guarded.address, api_key="secret", cacert=CERT) as client:
            await client.status()
            return (await client.generate("a", max_tokens=3)).text

    assert asyncio.run(answer()) == "bcd"


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_only_health_answers(guarded: LocalCluster, key: str) -> None:
    with Client(guarded.address, api_key=key, cacert=CERT) as client:
        assert client.ready()
        for refused in (client.status, lambda: client.generate("a"), lambda: next(client.watch())):
            with pytest.raises(Unauthenticated, match="send it as authorization: Bearer KEY.*BLITZJAX_API_KEY"):
                refused()
    with (grpc.secure_channel(guarded.address.removeprefix(access.TLS), grpc.ssl_channel_credentials(CERT.read_bytes()))
          as channel, pytest.raises(grpc.RpcError) as e):
        vllm_rpc.VllmEngineStub(channel).GetModelInfo(vllm.GetModelInfoRequest())
    assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_who_does_not_trust_the_certificate_or_speaks_in_the_clear_gets_nothing(guarded: LocalCluster) -> None:
    for client in (Client(guarded.address, api_key="secret"), Client(guarded.address.removeprefix(access.TLS))):
        with client, pytest.raises(Unavailable):
            client.status()


def test_http_is_encrypted_too(guarded: LocalCluster) -> None:
    def get(path: str, **headers: str) -> int:
        url = f"https://localhost:{guarded.config.serve.http_port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=300,
                                        context=ssl.create_default_context(cafile=CERT)) as answer:
                return answer.status
        except urllib.error.HTTPError as e:
            return e.code
        except urllib.error.URLError:
            return 0

    eventually(lambda: get("/health") == 200)
    assert [get("/v1/models", Authorization=f"{scheme} secret") for scheme in ("Bearer", "bearer", "Basic")] == [200, 200, 401]
    assert (get("/v1/models"), get("/v1/models", Authorization="Bearer secret")) == (401, 200)


def test_commands_take_the_key_from_the_environment(guarded: LocalCluster) -> None:
    at = ("--address", guarded.address, "--cacert", str(CERT))
    done = blitzjax("chat", "x", "--max-tokens", "2", *at, BLITZJAX_API_KEY="secret")
    assert (done.returncode, done.stdout) == (0, "bc\n"), done.stderr
    assert json.loads(blitzjax("status", "--json", *at, BLITZJAX_API_KEY="secret").stdout)["models"]
    done = blitzjax("status", *at, BLITZJAX_API_KEY="")
    assert done.returncode == 2 and "the API key is wrong or missing" in done.stderr
    done = blitzjax("status", "--address", guarded.address)
    assert done.returncode == 2 and "give --cacert" in done.stderr and "nothing listens" not in done.stderr
    done = blitzjax("status", "--address", guarded.address.removeprefix(access.TLS))
    assert done.returncode == 2 and f"only over TLS, as {guarded.address}" in done.stderr


def test_a_gateway_without_the_key_ends_and_says_so(guarded: LocalCluster) -> None:
    done = blitzjax("gateway", "--port", "0", "--address", guarded.address, "--cacert", str(CERT), BLITZJAX_API_KEY="wrong")
    assert done.returncode == 2 and "blitzjax gateway: the API key is wrong or missing" in done.stderr


def test_a_gateway_that_speaks_in_the_clear_says_what_is_wrong_and_goes_on(guarded: LocalCluster) -> None:
    with subprocess.Popen([sys.executable, "-m", "blitzjax.cli", "gateway", "--port", "0", "--address",
                           guarded.address.removeprefix(access.TLS)], stderr=subprocess.PIPE, text=True) as gateway:
        assert f"it may speak only over TLS, as {guarded.address}" in next(iter(gateway.stderr))
        gateway.terminate()
        assert gateway.wait(300) == 0


@pytest.mark.parametrize(("flags", "says"), [
    (("--ssl-certfile", "/nonexistent.pem", "--ssl-keyfile", str(KEY)), "cannot use the certificate /nonexistent.pem"),
    (("--ssl-certfile", str(KEY), "--ssl-keyfile", str(CERT)), "cannot use the certificate"),
    (("--ssl-certfile", str(CERT)), "TLS wants both"),
])
def test_a_certificate_that_cannot_be_used_is_said_at_the_start(
        flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("serve", "toy"), ("gateway",)):
        assert cli.main([*command, *flags]) == 2
        assert says in capsys.readouterr().err


def test_a_key_that_no_header_holds_and_a_ca_without_tls_are_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the address must be grpcs://127.0.0.1:1"):
        Client("127.0.0.1:1", cacert=CERT)
    with pytest.raises(ConfigError, match="cannot read the CA certificate /nonexistent: No such file"):
        Client("grpcs://127.0.0.1:1", cacert=Path("/nonexistent"))
    monkeypatch.setenv(access.KEY_VARIABLE, "secret\n")
    with pytest.raises(ConfigError, match="BLITZJAX_API_KEY must be printable ASCII"):
        Client("127.0.0.1:1")

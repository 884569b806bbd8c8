"""Who may call, and is it encrypted? The API key and the certificate at the edge of a cluster, on both sides of it.

Workers and the coordination service are behind the edge: they trust their network. Invariant: of a server with a key,
only health and reflection answer without it, and a certificate that cannot be used is an error before anything listens.
"""

from __future__ import annotations

import hmac
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import grpc

from blitzjax.addresses import is_address
from blitzjax.errors import ConfigError, Unauthenticated, reason

KEY_VARIABLE = "BLITZJAX_API_KEY"
TLS = "grpcs://"  # an address that begins so is called over TLS
_OPEN = ("/grpc.health.", "/grpc.reflection.")
_REFUSED = (f"the API key is wrong or missing: send it as authorization: Bearer KEY; blitzjax's own clients send "
            f"what {KEY_VARIABLE} says")
_ChannelOptions: TypeAlias = Sequence[tuple[str, int]]


def api_key() -> str:
    """Of this process, as server or client; empty: none. Raises ConfigError for one that no header can hold."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(f"{KEY_VARIABLE} must be printable ASCII, without space or newline at its ends")
    return key


def check(authorization: str, key: str) -> None:
    """The header that a caller sent. Raises Unauthenticated."""
    scheme, _, token = authorization.partition(" ")
    given = token if scheme.lower() == "bearer" else authorization
    if key and not hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode()):
        raise Unauthenticated(_REFUSED)


class KeyCheck(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED in place of the service."""

    def __init__(self, key: str):
        self._key = key

    async def intercept_service(self, continuation, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        given = next((value for name, value in details.invocation_metadata or () if name == "authorization"), "")
        try:
            if not details.method.startswith(_OPEN):
                check(given, self._key)
        except Unauthenticated:
            return grpc.unary_unary_rpc_method_handler(_refuse)
        return await continuation(details)


async def _refuse(request: bytes, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSED)


def server_context(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """For HTTP; None, without files: not encrypted. Raises ConfigError when certificate and key cannot be used."""
    if not (certfile or keyfile):
        return None
    if not (certfile and keyfile):
        raise ConfigError("TLS wants both, a certificate (ssl_certfile) and its key (ssl_keyfile)")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # never asked for on the terminal
    except OSError as e:
        raise ConfigError(f"cannot use the certificate {certfile} with the key {keyfile}: {reason(e)}") from e
    return context


def server_credentials(certfile: str, keyfile: str) -> grpc.ServerCredentials | None:
    """The same for gRPC."""
    if server_context(certfile, keyfile) is None:
        return None
    return grpc.ssl_server_credentials([(Path(keyfile).read_bytes(), Path(certfile).read_bytes())])


def channel(library, address: str, options: _ChannelOptions, cacert: Path | None):
    """Of `library`, grpc or grpc.aio. `cacert`: PEM of who may have signed the server's certificate; None: those that
    gRPC trusts. Raises ConfigError.
    """
    where = address.removeprefix(TLS)
    if where.startswith(("http://", "https://")) or not (where.startswith("unix:") or is_address(where)):
        raise ConfigError(f"an address is HOST:PORT, or {TLS}HOST:PORT over TLS, got {address!r}")
    if not address.startswith(TLS):
        if cacert is not None:
            raise ConfigError(f"a CA certificate is for TLS: the address must be {TLS}{address}")
        return library.insecure_channel(address, options)
    try:
        roots = None if cacert is None else cacert.read_bytes()
        if roots is not None:
            ssl.create_default_context(cadata=roots.decode())
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the CA certificate {cacert}: {reason(e)}") from e
    return library.secure_channel(where, grpc.ssl_channel_credentials(roots), options)


def metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """Of every call; None: with the key of this process."""
    key = api_key() if key is None else key
    return (("authorization", f"Bearer {key}"),) if key else ()

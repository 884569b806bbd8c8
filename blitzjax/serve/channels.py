"""With which options do our gRPC channels and servers open, and how soon does either end notice that the other is gone?

A process that dies says so through its kernel; a machine that loses power, or a process that is stopped, does not. So
both ends ping what is silent. Invariant: a server allows the pings of its clients, else it ends the connection with "too
many pings"; and who hears from a controller waits for longer than one may be stopped before it is killed and resumed.
"""

from __future__ import annotations

from typing import TypeAlias

Options: TypeAlias = tuple[tuple[str, int], ...]
MAX_REQUEST_BYTES = 64 << 20  # and what a relay says around it


def pings(every_ms: int) -> Options:
    """An end that has been silent for `every_ms` during a call is asked, and gone after as long again."""
    return (("grpc.keepalive_time_ms", every_ms),
            ("grpc.keepalive_timeout_ms", every_ms),
            ("grpc.http2.ping_timeout_ms", every_ms),  # the keepalive timeout alone does not end the connection
            ("grpc.http2.max_pings_without_data", 0))


_ANY_SIZE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_AFRESH = (("grpc.use_local_subchannel_pool", 1),)  # each channel connects, without another's backoff
_ALL_CALLS = (("grpc.server.max_pending_requests", 1 << 30),  # else some of a burst, anybody's, end with CANCELLED
              ("grpc.server.max_pending_requests_hard_limit", 1 << 30))
_SAYS_SOMETHING = ("grpc.min_reconnect_backoff_ms", 10_000)  # in such a time, who listens; else another connection is tried
_ALONE = (("grpc.so_reuseport", 0),)  # a second server on a port is a mistake, not a lottery

TO_WORKER = (*_AFRESH, *_ANY_SIZE, *pings(4_000))
WORKER_SERVER = (*_ALONE, *_ANY_SIZE, *pings(15_000), ("grpc.http2.max_ping_strikes", 0))
TO_CONTROLLER = (*_AFRESH, ("grpc.max_receive_message_length", -1), ("grpc.initial_reconnect_backoff_ms", 100),
                 ("grpc.max_reconnect_backoff_ms", 1000), _SAYS_SOMETHING, *pings(20_000))
CONTROLLER_SERVER = (*_ALONE, *_ALL_CALLS, ("grpc.max_receive_message_length", MAX_REQUEST_BYTES + 1024), *pings(20_000),
                     ("grpc.http2.min_ping_interval_without_data_ms", 5_000))

"""The coordination service in a process of its own: `python -m blitzjax.transfer.coordinator`.

It holds no parameters and runs no model, so no worker's death ends it; its own death ends every joined worker
(the library aborts them), so supervise the whole pool with it. Stops at SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys

from blitzjax.addresses import address, check_free
from blitzjax.errors import BlitzError
from blitzjax.transfer import compat


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blitzjax coordinator", description="The service that says who belongs to a cluster.")
    parser.add_argument("--address", required=True, type=address, metavar="HOST:PORT", help="listen here")
    parser.add_argument("--size", type=int, required=True, help="number of workers")
    parser.add_argument("--heartbeat-s", type=float, default=10.0, help="a silent worker is dead after this")
    args = parser.parse_args(argv)
    if args.size < 1:
        parser.error(f"--size must be at least 1, got {args.size}")
    if not 0 < args.heartbeat_s < math.inf:
        parser.error(f"--heartbeat-s must be above 0, got {args.heartbeat_s:g}")
    try:
        check_free(args.address)
    except BlitzError as e:
        print(f"blitzjax coordinator: {e}", file=sys.stderr)
        return 2
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the service starts its threads: they inherit the mask
    service = compat.start_coordination_service(args.address, args.size, args.heartbeat_s)
    with contextlib.suppress(OSError):  # a full disk
        print(f"coordinator ready at {args.address} for {args.size} workers", file=sys.stderr, flush=True)
    signal.sigwait(stop)
    service.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

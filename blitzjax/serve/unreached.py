"""What does gRPC mean when a call did not reach a server, in words of whoever made it?

Invariant: what a server said itself is never changed; nor is what nothing here is known of.
"""

from __future__ import annotations

from blitzjax.serve.access import TLS

_MEANT = (  # of what gRPC says, first come first served
    ("CERTIFICATE_VERIFY_FAILED", "the certificate of {0} is not trusted; give --cacert who signed it, or itself"),
    ("andshake", "what listens on {0} does not speak TLS; blitzjax does with --ssl-certfile"),
    ("before receiving SETTINGS", "what listens on {0} does not answer"),
    ("SETTINGS frame", "what listens on {0} does not speak gRPC; HTTP has a port of its own"),
    ("last error: UNAVAILABLE", f"what listens on {{0}} hangs up; it may speak only over TLS, as {TLS}{{0}}"),
    ("resol", "no host of that name: {0}"),
    ("lookup failed", "no host of that name: {0}"),
    ("refused", "nothing listens on {0}"),
    ("No such file", "nothing listens on {0}"),
    ("failed to connect to all addresses", "cannot connect to {0}"),
    ("Socket closed", "the connection to {0} broke"),
    ("Connection reset", "the connection to {0} broke"),
    ("GOAWAY", "the connection to {0} broke"),
    ("ping timeout", "{0} answers no more"),
    ("watchdog timeout", "{0} answers no more"),
    ("Deadline Exceeded", "{0} has not answered in time"),
    ("Method not found", "what listens on {0} is no controller of blitzjax"),
)


def meant(details: str, address: str) -> str | None:
    """By the details of a status that no server sent; None: nothing here is known of it."""
    return next((text.format(address) for sign, text in _MEANT if sign in details), None)

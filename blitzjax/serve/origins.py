"""Whose web pages may call over HTTP? A browser lets a page ask a server of another origin, and read what it answers, if
the server says so: CORS.

Invariant: what is said depends on the page's origin alone, so errors say it too; the key is checked all the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from blitzjax.config import ORIGINS, is_origin

if TYPE_CHECKING:
    from aiohttp import web

ANY = "*"
_READ = "X-Request-Id, Retry-After"  # beside what every page may read of an answer
_REMEMBERED_S = "600"  # as vLLM has it


class Origins:
    """Those that may call. Immutable."""

    def __init__(self, named: Collection[str], key: str):
        """With none named, any may if there is a key: browsers send none that the page has not been told. Without a key
        any page that somebody visits could use models that only their machine, or their network, is meant to reach.
        """
        self._allowed = frozenset(named or ((ANY,) if key else ()))

    def headers(self, origin: str) -> Mapping[str, str]:
        """Of an answer to a page of `origin`; empty: to who is none, or is at home here."""
        if not origin or not self._allowed:
            return {}
        if ANY in self._allowed:
            return {"Access-Control-Allow-Origin": ANY, "Access-Control-Expose-Headers": _READ}
        if origin not in self._allowed:
            return {"Vary": "Origin"}
        return {"Vary": "Origin", "Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _READ}

    def may(self, origin: str) -> bool:
        return not self._allowed.isdisjoint((ANY, origin))


def asks_first(request: web.Request) -> bool:
    """A browser wants to know whether a page may make some other request; it has no key to show."""
    return request.method == "OPTIONS" and {"Origin", "Access-Control-Request-Method"} <= request.headers.keys()


def granted(request: web.Request) -> Mapping[str, str]:
    """To one that asks first and may. Its headers are named: `*` would leave out Authorization."""
    return {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": _REMEMBERED_S,
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "")}


def origins(text: str) -> list[str]:
    """`text`, the type of an argument, if it is a JSON list of origins. Raises ArgumentTypeError."""
    try:
        named = json.loads(text)
    except ValueError:
        named = None
    if not isinstance(named, list) or not all(map(is_origin, named)):
        raise argparse.ArgumentTypeError(f"wants a JSON list of origins, as {ORIGINS}, got {text!r}")
    return named

"""How does a bench end? With one JSON object as its last line, which says the command that made it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def say(bench: str, result: Mapping[str, object], argv: Sequence[str] | None, out: Path | None) -> None:
    """`argv`: what main was given, None for the process's own. Writes the object to `out`, too."""
    command = " ".join([f"python -m bench.{bench}", *(sys.argv[1:] if argv is None else argv)])
    text = json.dumps({**result, "command": command})
    if out is not None:
        out.write_text(text + "\n")
    print(text)

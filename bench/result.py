"""How does a bench end? With one JSON object as its last line, which says the command that made it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def say(bench: str, result: Mapping[str, object], argv: Sequence[str] | None, out: Path | None) -> None:
    """`argv`: what main was given, None for the process's own. Writes the object to `out`, too."""
    command = " ".join([f"python -m bench.{bench}", *(sys.argv[1:] if argv is None else argv)])
    text = json.dumps({**result, "command": command})
    if out is not None:
        out.write_text(text + "\n")
    print(text)


def of_rounds(bench: str, about: str | None, measure: Callable[[int], Mapping[str, object]], rounds: int,
              argv: Sequence[str] | None) -> int:
    """The main of a bench that has nothing to choose but how many rounds it takes."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{bench}", description=about)
    parser.add_argument("--rounds", type=int, default=rounds, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    say(bench, measure(2 if args.quick else args.rounds), argv, args.out)
    return 0

"""From what a user names as MODEL to a checkpoint directory in our layer order; converts once and caches.

Invariant: two processes that resolve the same model at once convert it once.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from blitzjax.engine import checkpoint, gguf_tokenizer, hf_config, hf_tokenizer, locations, orbax_reader, trial
from blitzjax.engine.gguf_reader import GGUF
from blitzjax.engine.orbax_reader import Orbax
from blitzjax.engine.params import unit_arrays
from blitzjax.engine.safetensors_reader import HuggingFace
from blitzjax.errors import CheckpointError
from blitzjax.models import own
from blitzjax.types import DTYPES, ModelSpec, compute_dtype

# Small enough for every test: about 300 KB in float32, byte-level text.
TINY = ModelSpec(name="tiny", family="llama", layers=4, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=128,
                 vocab=272, max_len=512, rope_theta=10000.0, norm_eps=1e-5, tied_embeddings=True, dtype="float32",
                 eos_token_ids=(257,))


def resolve(model: str, dtype: str, cache_dir: Path | None = None, source: Path | None = None) -> Path:
    """MODEL is a checkpoint directory (ours, Hugging Face, Orbax), a .gguf file, a built-in name, or code of yours.

    Returns a directory of ours. Others are converted to `dtype` under CACHE/models/vFORMAT.CONVERTER; `cache_dir` None means
    $BLITZJAX_CACHE or ~/.cache/blitzjax. `source` is where the parameters of your code are. Raises CheckpointError
    saying what MODEL may be, or what is wrong with it.
    """
    path = Path(model).expanduser()
    if (path / locations.MANIFEST).is_file():
        return path
    models = locations.models_in(cache_dir or locations.default_cache())
    if own.is_reference(model):
        return _resolve_own(model, dtype, models, source)
    if source is not None:
        raise CheckpointError(f"{model!r} is not package.module:function, so its parameters cannot be at {source}")
    path, name, target = locations.place(model, dtype, models)
    return _convert_once(target, lambda: locations.place(model, dtype, models, download=False)[2],
                         lambda: convert(path, name, dtype, target))


def _resolve_own(model: str, dtype: str, models: Path, source: Path | None) -> Path:
    if source is None:
        raise CheckpointError(f"{model} is code; its parameters are an Orbax checkpoint: --checkpoint DIR")
    if not source.is_dir():
        raise CheckpointError(f"--checkpoint {source}: there is no such directory")
    spec = checkpoint.with_dtype(own.load(model)[0], dtype)
    trial.check(spec)
    tree = orbax_reader.find(source.resolve())
    if tree is None:
        below = sorted({str(mark.parent) for depth in ("*", "*/*") for mark in source.glob(f"{depth}/{orbax_reader.MARK}")})
        raise CheckpointError(f"{source} has no Orbax checkpoint of a name that is looked for; {model} needs one"
                              + (f": one of {', '.join(below)}?" if below else ""))
    layouts = [unit_arrays(spec, unit) for unit in range(spec.units)]

    def place() -> Path:
        files = [file for file in source.resolve().iterdir() if file.is_file()]
        stamp = zlib.crc32(f"{locations.stamp(tree, *files)} {spec} {layouts}".encode())
        return models / f"{spec.name.replace('/', '-')}-{stamp:08x}-{dtype}"

    target = place()
    return _convert_once(target, place, lambda: convert(tree, model, dtype, target, tokenizer_in=source))


def convert(source: Path, name: str, dtype: str, target: Path, tokenizer_in: Path | None = None) -> None:
    """Writes the checkpoint `target` from a file or directory in another format, one unit in memory at a time.

    `name` becomes the model's, or is the package.module:function that builds it. `tokenizer_in`: unless it is in `source`.
    """
    opened: GGUF | HuggingFace | Orbax
    tokenizer: checkpoint.Tokenizer | None
    read_in = compute_dtype(dtype)
    if source.is_file():
        opened = GGUF.open(source, name, read_in)
        tokenizer = gguf_tokenizer.from_gguf(source, opened.reader)
    else:
        opened = _open_directory(source, name, read_in, target.parent)
        tokenizer = hf_tokenizer.read(tokenizer_in or source)
    checkpoint.write(target, checkpoint.with_dtype(opened.spec, dtype), opened.units(), tokenizer)


def _open_directory(source: Path, name: str, dtype: str, scratch: Path) -> HuggingFace | Orbax:
    if own.is_reference(name):
        return Orbax.open(source, checkpoint.with_dtype(own.load(name)[0], dtype), scratch)
    if HuggingFace.present(source):
        return HuggingFace.open(source, name, dtype)
    if orbax_reader.find(source) is not None:
        return Orbax.open(source, hf_config.read_spec(source, name, dtype), scratch)
    raise CheckpointError(f"{source} has neither {locations.MANIFEST} (ours) nor .safetensors files (Hugging Face) "
                          "nor an Orbax checkpoint; a PyTorch .bin must be saved as safetensors first")


def write_random(path: Path, spec: ModelSpec, seed: int) -> None:
    """Writes a checkpoint of random parameters with a byte-level tokenizer; the same seed gives the same bytes."""
    units = (random_unit(spec, unit, seed) for unit in range(spec.units))
    checkpoint.write(path, spec, units, gguf_tokenizer.bytes_only(spec.vocab))


def random_unit(spec: ModelSpec, unit: int, seed: int) -> dict[str, np.ndarray]:
    """Unsharded float32 arrays scaled so that greedy text wanders and top-2 margins are wide; norms are not all 1."""
    rng = np.random.default_rng([seed, unit])
    arrays = {}
    for info in unit_arrays(checkpoint.with_dtype(spec, spec.compute_dtype), unit):
        values = rng.standard_normal(info.shape, np.float32)
        if len(info.shape) == 1:
            arrays[info.name] = 1 + 0.2 * values
        elif info.axes[0] == "vocab":
            arrays[info.name] = 0.3 * values
        else:
            inputs = info.shape[-1] if info.axes[0] != "embed" else int(np.prod(info.shape[1:]))
            arrays[info.name] = 2 * values * inputs ** -0.5  # at 1 greedy text ends in one token repeated
    return arrays


def _convert_once(target: Path, place: Callable[[], Path], write: Callable[[], None]) -> Path:
    """`target` is what `place` says: it is named after the files that are read, so it is another one if they change."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        for left in target.parent.glob(f".{glob.escape(target.name)}-????????"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not target.exists():
            write()
            if place() != target:
                shutil.rmtree(target)
                raise CheckpointError("its files changed while they were read; convert it again when they are complete")
    locations.mark_used(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """`python -m blitzjax.engine.convert MODEL [--checkpoint DIR]`: a directory of ours is the last line printed."""
    parser = argparse.ArgumentParser(prog="python -m blitzjax.engine.convert", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what somebody's code prints, also at its exit, is not the answer
    try:
        print(resolve(args.model, args.dtype, source=args.checkpoint), file=out, flush=True)
    except CheckpointError as e:
        print(e, file=sys.stderr)
        return 1
    except OSError as e:
        print(f"{e}; it would be kept in {locations.default_cache()}, BLITZJAX_CACHE may name another directory",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

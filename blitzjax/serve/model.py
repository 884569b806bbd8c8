"""One checkpoint directory as the controller sees it: sizes and tokenizer, never arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from blitzjax.engine.locations import FORMAT_VERSION, MANIFEST
from blitzjax.errors import CheckpointError
from blitzjax.serve import codec
from blitzjax.serve.tokenizer import Tokenizer
from blitzjax.types import ModelSpec


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that this cluster serves. `bytes` are those of all units."""

    name: str
    directory: Path
    spec: ModelSpec
    manifest_json: str
    bytes: int
    tokenizer: Tokenizer | None


def load_model(directory: Path, name: str = "") -> ServedModel:
    """Reads `manifest.json` and the tokenizer, never the arrays; the model is served as `name`, if there is one.

    Raises CheckpointError.
    """
    spec, manifest_json, size = read_manifest(directory, name)
    tokenizer = Tokenizer(directory) if Tokenizer.present(directory) else None
    return ServedModel(spec.name, directory.resolve(), spec, manifest_json, size, tokenizer)


def read_manifest(directory: Path, name: str = "") -> tuple[ModelSpec, str, int]:
    """→ the model, served as `name` if there is one; the manifest that says so; bytes of all units.

    The manifest is the same text whichever way the name was come by: workers tell models apart by it. Raises
    CheckpointError.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        manifest["spec"]["name"] = name or manifest["spec"]["name"]
        manifest_json = json.dumps(manifest)
        spec = codec.model_spec(manifest_json)
        size, version = sum(int(unit["bytes"]) for unit in manifest["units"]), manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{directory} is not a blitzjax checkpoint ({path.name}: {e!r}); "
                              "run: blitzjax convert") from e
    if version != FORMAT_VERSION:  # workers refuse it, too, but then it is deployed
        raise CheckpointError(f"{directory}: format version {version!r}, this program reads {FORMAT_VERSION}; "
                              "convert the model again")
    return spec, manifest_json, size

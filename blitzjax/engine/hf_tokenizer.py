"""The tokenizer files of a Hugging Face directory → tokenizer.json and tokenizer_config.json as we store them.

tokenizer.json is taken as it is, with the tokens that only files beside it list; without it, tokenizer.model
(SentencePiece) is turned into one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from blitzjax.engine import sentencepiece_tokenizer
from blitzjax.engine.checkpoint import Tokenizer
from blitzjax.engine.hf_config import read_json
from blitzjax.errors import CheckpointError

TOKENIZER, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read(path: Path) -> Tokenizer | None:
    """None for a directory without a tokenizer: it is served with token ids only. Raises CheckpointError."""
    config = (read_json(path / "special_tokens_map.json") or {}) | (read_json(path / CONFIG) or {})
    kept = {name: config[name] for name in _NAMES if config.get(name) is not None}
    if (path / TOKENIZER).is_file():
        text = _completed(path / TOKENIZER, _listed(path, config))
    elif (path / SENTENCEPIECE).is_file():
        text, names = _from_sentencepiece(path, config)
        kept = names | kept
    else:
        return None
    return Tokenizer(text, json.dumps(kept | {"chat_template": _chat_template(path, config)}))


def _completed(path: Path, listed: Mapping[int, AddedToken]) -> str:
    try:
        text = path.read_text("utf-8")
        built = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the Rust library raises bare Exception
        raise CheckpointError(f"cannot read {path}: {e}") from e
    first = built.get_vocab_size()
    lacking = {token.content: index for index, token in sorted(listed.items())
               if index >= first and built.token_to_id(token.content) is None}
    if not lacking:
        return text
    built.add_tokens([listed[index] for index in lacking.values()])
    if any(built.token_to_id(token) != index for token, index in lacking.items()):
        raise CheckpointError(f"{path} lacks tokens with ids {list(lacking.values())}, they should follow its {first}")
    return built.to_str()


def _from_sentencepiece(path: Path, config: Mapping[str, object]) -> tuple[str, dict[str, str]]:
    """The text of tokenizer.json, and the names of BOS and EOS. A BOS is put first unless the configuration says no."""
    vocabulary, bos, eos = sentencepiece_tokenizer.read(path / SENTENCEPIECE)
    built = sentencepiece_tokenizer.build(vocabulary, _added(path, _listed(path, config), len(vocabulary.pieces)))
    sentencepiece_tokenizer.surround(built, bos if config.get("add_bos_token", True) else None,
                                     eos if config.get("add_eos_token", False) else None)
    return built.to_str(), {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}


def _listed(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens by the ids that files beside the vocabulary give them."""
    tokens = {int(index): AddedToken(
        token["content"], special=token.get("special", True), normalized=False,
        **{flag: token.get(flag, False) for flag in ("lstrip", "rstrip", "single_word")})
        for index, token in (config.get("added_tokens_decoder") or {}).items()}
    named = [config.get(name) for name in _NAMES] + (config.get("additional_special_tokens") or [])
    special = [token["content"] if isinstance(token, dict) else token for token in named]
    for text, index in (read_json(path / "added_tokens.json") or {}).items():
        tokens.setdefault(index, AddedToken(text, special=text in special, normalized=False))
    return tokens


def _added(path: Path, listed: Mapping[int, AddedToken], pieces: int) -> list[AddedToken]:
    """Tokens beyond the SentencePiece vocabulary, in the order of their ids."""
    beyond = sorted(index for index in listed if index >= pieces)
    if beyond != list(range(pieces, pieces + len(beyond))):
        raise CheckpointError(f"{path}: added tokens have ids {beyond}, they should follow the {pieces} pieces")
    return [listed[index] for index in beyond]


def _chat_template(path: Path, config: Mapping[str, object]) -> object:
    """A file of its own wins over the configuration, as in transformers."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    return (read_json(path / "chat_template.json") or {}).get("chat_template", config.get("chat_template"))

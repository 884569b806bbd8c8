"""Builds tokenizer.json and tokenizer_config.json: from a GGUF file's tokens and merges, or byte-level for tiny models.

Only byte-level BPE is read (`tokenizer.ggml.model` = "gpt2"); how text is cut before merging is named by
`tokenizer.ggml.pre` and written down in `_PRE_TOKENIZERS`.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from blitzjax.engine.checkpoint import Tokenizer
from blitzjax.engine.gguf_reader import field
from blitzjax.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
}


def from_gguf(path: Path, reader: gguf.GGUFReader) -> Tokenizer:
    """Raises CheckpointError for a tokenizer that is not byte-level BPE or is cut in a way we do not know."""
    model, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; "
                              f"supported: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges", [])]
    types = field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    added = [AddedToken(token, special=kind == _CONTROL, normalized=False)
             for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    try:
        built = _build({token: i for i, token in enumerate(tokens)}, merges, added, _PRE_TOKENIZERS[pre]())
    except Exception as e:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path}: tokens and merges do not make a tokenizer: {e}") from e

    def text(key: str) -> str | None:
        index = field(reader, f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    return _pack(built, field(reader, "tokenizer.chat_template", CHATML), text("bos"), text("eos"))


def bytes_only(vocab: int) -> Tokenizer:
    """Token b is byte b; 256 is <|im_start|>, 257 <|im_end|>, and the rest of `vocab` is reserved special tokens."""
    assert vocab >= 258, "256 bytes and two special tokens"
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # as GPT-2 maps bytes to characters
    others = [b for b in range(256) if b not in printable]
    ids = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    special = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(vocab - 258))]
    ids |= {token: 256 + i for i, token in enumerate(special)}
    built = _build(ids, [], [AddedToken(token, special=True, normalized=False) for token in special], _byte_level())
    return _pack(built, CHATML, special[0], special[1])


def _build(ids: dict[str, int], merges: list[tuple[str, ...]], added: list[AddedToken],
           pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    built.pre_tokenizer, built.decoder = pre_tokenizer, decoders.ByteLevel()
    built.add_tokens(added)
    assert built.get_vocab_size() == len(ids), "added tokens are part of the vocabulary"
    return built


def _pack(built: tokenizers.Tokenizer, chat_template: str, bos: str | None, eos: str | None) -> Tokenizer:
    return Tokenizer(built.to_str(), json.dumps({"chat_template": chat_template, "bos_token": bos, "eos_token": eos}))

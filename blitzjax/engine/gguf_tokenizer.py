"""Builds tokenizer.json and tokenizer_config.json: from what is in a GGUF file, or byte-level for tiny models.

`tokenizer.ggml.model` is "gpt2" (byte-level BPE; `tokenizer.ggml.pre` names how text is cut before merging, written
down in `_PRE_TOKENIZERS`) or "llama" (SentencePiece's BPE, as scores).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from blitzjax.engine import sentencepiece_tokenizer as sentencepiece
from blitzjax.engine.checkpoint import Tokenizer
from blitzjax.engine.gguf_reader import field
from blitzjax.errors import CheckpointError

_CONTROL, _USER_DEFINED = sentencepiece.CONTROL, sentencepiece.USER_DEFINED  # gguf.TokenType has the same numbers

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's pattern, with `digits` digits to a number."""
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
                  + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _words("{1,3}"),
    "qwen2": lambda: _words(""),
}
_BEGIN = ("llama-bpe",)  # texts begin with BOS, as llama.cpp has it (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_LLAMA3)


def from_gguf(path: Path, reader: gguf.GGUFReader) -> Tokenizer:
    """Raises CheckpointError for a kind of tokenizer, or a way of cutting, that we do not know."""
    model, tokens = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.tokens", [])

    def text(key: str) -> str | None:
        index = field(reader, f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    bos, eos = text("bos"), text("eos")
    try:
        built = (_from_scores if model == "llama" else _from_merges)(path, reader, tokens)
        begins = model == "llama" or field(reader, "tokenizer.ggml.pre") in _BEGIN  # if the file does not say, as most
        around = [token if field(reader, f"tokenizer.ggml.add_{key}_token", key == "bos" and begins) else None
                  for key, token in (("bos", bos), ("eos", eos))]
        sentencepiece.surround(built, *around)
    except CheckpointError:
        raise
    except Exception as e:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path}: the tokens in it do not make a tokenizer: {e}") from e
    return _pack(built, field(reader, "tokenizer.chat_template", CHATML), bos, eos)


def _from_merges(path: Path, reader: gguf.GGUFReader, tokens: list[str]) -> tokenizers.Tokenizer:
    model, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; supported: "
                              f"'llama', and 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges", [])]
    added = [AddedToken(token, special=kind == _CONTROL, normalized=False)
             for token, kind in zip(tokens, _types(reader, tokens), strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    ids = {token: index for index, token in enumerate(tokens)}
    return _build(ids, merges, added, _PRE_TOKENIZERS[pre](), whole_words=pre == "llama-bpe")


def _from_scores(path: Path, reader: gguf.GGUFReader, tokens: list[str]) -> tokenizers.Tokenizer:
    del path
    pieces = tuple(map(sentencepiece.Piece, tokens, field(reader, "tokenizer.ggml.scores"), _types(reader, tokens)))
    prefix_space = field(reader, "tokenizer.ggml.add_space_prefix", True)
    return sentencepiece.build(sentencepiece.Vocabulary(pieces, False, prefix_space, squeeze_spaces=False))


def _types(reader: gguf.GGUFReader, tokens: list[str]) -> list[int]:
    return field(reader, "tokenizer.ggml.token_type", [sentencepiece.NORMAL] * len(tokens))


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


def _build(ids: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken],
           pre_tokenizer: pre_tokenizers.PreTokenizer, whole_words: bool = False) -> tokenizers.Tokenizer:
    """`whole_words`: a word that is a token is that token, whatever merges would make of it."""
    built = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words))
    built.pre_tokenizer, built.decoder = pre_tokenizer, decoders.ByteLevel()
    built.add_tokens(added)
    assert built.get_vocab_size() == len(ids), "added tokens are part of the vocabulary"
    return built


def _pack(built: tokenizers.Tokenizer, chat_template: str, bos: str | None, eos: str | None) -> Tokenizer:
    return Tokenizer(built.to_str(), json.dumps({"chat_template": chat_template, "bos_token": bos, "eos_token": eos}))

"""A SentencePiece vocabulary as tokenizer.json: the same ids, without SentencePiece in the serving process.

BPE merges are rebuilt from the scores: SentencePiece joins the neighbours whose joined piece scores highest, which is
what ranked merges do when pieces are ranked by score (Kudo & Richardson, arXiv:1808.06226).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from blitzjax.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece_model.proto; GGUF uses the same
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What SentencePiece's model file says; `charsmap` is its compiled character normalisation, often empty."""

    pieces: tuple[Piece, ...]
    unigram: bool
    prefix_space: bool
    squeeze_spaces: bool
    charsmap: bytes = b""

    def token(self, index: int | None) -> str | None:
        return None if index is None or index < 0 else self.pieces[index].text


def read(path: Path) -> tuple[Vocabulary, str | None, str | None]:
    """tokenizer.model → vocabulary, BOS, EOS. Raises CheckpointError."""
    model = pb.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at run time
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as e:  # protobuf's DecodeError is not of one class in all its versions
        raise CheckpointError(f"{path} is not a SentencePiece model ({e}); download it again") from e
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE) or trainer.treat_whitespace_as_suffix:
        raise CheckpointError(f"{path}: only unigram and BPE models with spaces before words are supported")
    vocabulary = Vocabulary(
        tuple(Piece(p.piece, p.score, p.type) for p in model.pieces), trainer.model_type == trainer.UNIGRAM,
        normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.precompiled_charsmap)
    return vocabulary, vocabulary.token(trainer.bos_id), vocabulary.token(trainer.eos_id)


def build(vocabulary: Vocabulary, added: Sequence[AddedToken] = ()) -> tokenizers.Tokenizer:
    """`added` are tokens that follow the pieces. Ids of plain text are SentencePiece's, but where two segmentations of
    a unigram model score the same.
    """
    built = tokenizers.Tokenizer(_unigram(vocabulary) if vocabulary.unigram else _bpe(vocabulary))
    built.normalizer = normalizers.Sequence(_normalizers(vocabulary))
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.prefix_space else []
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    # A user-defined run of spaces stays with the model: text has plain spaces until it is normalised.
    built.add_tokens([AddedToken(p.text, special=p.kind != USER_DEFINED, normalized=False) for p in vocabulary.pieces
                      if p.kind in (UNKNOWN, CONTROL) or (p.kind == USER_DEFINED and _SPACE not in p.text)])
    built.add_tokens(list(added))
    return built


def surround(built: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Plain texts get these tokens (BOS, EOS) around them from now on."""
    around = [token for token in (before, after) if token]
    if around:
        built.post_processor = processors.TemplateProcessing(
            single=[before, "$A", after][0 if before else 1:3 if after else 2],
            special_tokens=[(token, built.token_to_id(token)) for token in around])


def _unigram(vocabulary: Vocabulary) -> models.Unigram:
    return models.Unigram([(p.text, p.score) for p in vocabulary.pieces], _unknown(vocabulary),
                          any(p.kind == BYTE for p in vocabulary.pieces))


def _bpe(vocabulary: Vocabulary) -> models.BPE:
    ids = {p.text: index for index, p in enumerate(vocabulary.pieces)}
    joinable = {p.text for p in vocabulary.pieces if p.kind in (NORMAL, USER_DEFINED)}
    merges = []
    for piece in vocabulary.pieces:
        if piece.text in joinable:
            splits = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
            merges += [(-piece.score, ids[a], ids[b], a, b) for a, b in splits if a in joinable and b in joinable]
    unknown = _unknown(vocabulary)
    return models.BPE(vocab=ids, merges=[(a, b) for *_, a, b in sorted(merges)], fuse_unk=True,
                      unk_token=None if unknown is None else vocabulary.pieces[unknown].text,
                      byte_fallback=any(p.kind == BYTE for p in vocabulary.pieces))


def _unknown(vocabulary: Vocabulary) -> int | None:
    return next((index for index, p in enumerate(vocabulary.pieces) if p.kind == UNKNOWN), None)


def _normalizers(vocabulary: Vocabulary) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.squeeze_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.prefix_space:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]

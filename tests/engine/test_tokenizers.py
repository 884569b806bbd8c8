"""Tokenizers that we build have the ids of the library that made the model; text streams in whole characters."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from blitzjax.engine import gguf_tokenizer, hf_tokenizer, sentencepiece_tokenizer
from blitzjax.errors import CheckpointError
from blitzjax.serve.tokenizer import IncrementalDecoder, Tokenizer

_CODE = Path(sentencepiece_tokenizer.__file__).read_text()
_TEXT = [line for line in _CODE.splitlines() if line] + ["Zürich é  x 😀"] * 9
_WORDS = st.lists(st.sampled_from([*" abest.(_)\n<>Züé😀🏳️‍🌈日", "  ", "return", "token", "0", "0Å", "\t"]), max_size=25)


@dataclass(frozen=True, slots=True)
class Case:
    """A SentencePiece model, and our reading of it."""

    theirs: sentencepiece.SentencePieceProcessor
    ours: Tokenizer
    directory: Path


def train(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_TEXT), model_writer=out, num_threads=1,
                                             minloglevel=2, **options)
    path.write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def stored(made: hf_tokenizer.Tokenizer, directory: Path) -> Tokenizer:
    """As a checkpoint of ours has it."""
    (directory / "tokenizer.json").write_text(made.tokenizer)
    (directory / "tokenizer_config.json").write_text(made.config)
    return Tokenizer(directory)


_LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 450,
          "remove_extra_whitespaces": False, "split_digits": True}


@pytest.fixture(scope="module", params=[
    _LLAMA, _LLAMA | {"add_dummy_prefix": False, "user_defined_symbols": ["<turn>", "▁▁", "▁▁▁▁"]},
    {"model_type": "unigram", "vocab_size": 200},
    {"model_type": "bpe", "vocab_size": 200, "character_coverage": 0.985}],
    ids=["llama", "gemma", "unigram", "unknowns"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("spm")
    theirs = train(directory / "tokenizer.model", **request.param)
    return Case(theirs, stored(hf_tokenizer.read(directory), tmp_path_factory.mktemp("ours")), directory)


def test_sentencepiece_ids_and_text(case: Case) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(_WORDS.map("".join))
    def same(text: str) -> None:
        ids = case.theirs.encode(text)
        found = list(case.ours.encode_rendered(text))
        if found != ids:  # only where unigram segmentations tie
            ours, best = (sum(map(case.theirs.get_score, i)) for i in (found, ids))
            assert case.theirs.decode(found) == case.theirs.decode(ids) and ours == pytest.approx(best, abs=1e-4)
        assert case.ours.encode(text) == (case.theirs.bos_id(), *found)
        if case.theirs.unk_id() not in ids:
            assert case.ours.decode(ids) == case.theirs.decode(ids)

    same()


def test_streams_whole_characters(case: Case) -> None:
    """Byte-fallback characters and leading spaces, after a prompt that may end inside a character."""
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(_WORDS.map("".join), _WORDS.map("".join))
    def same(prompt: str, text: str) -> None:
        ids = list(case.ours.encode(prompt + " " + text))
        cut = min(len(case.ours.encode(prompt)), len(ids))
        decoder, whole = IncrementalDecoder(case.ours, ids[:cut]), case.ours.decode(ids)
        pieces = [decoder.push((token,)) for token in ids[cut:]]
        assert not any("\ufffd" in piece for piece in pieces)
        answer = "".join(pieces) + decoder.flush()
        begun = next(n for n in range(cut, -1, -1) if "\ufffd" not in case.ours.decode(ids[:n]))
        assert case.ours.decode(ids[:begun]) + answer == whole

    same()


def test_tokens_alone_add_up_to_the_text(case: Case) -> None:
    """Decoders take a space from the beginning of what they decode, which for a token alone is a part of it."""
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(_WORDS.map("".join))
    def same(text: str) -> None:
        ids = [i for i in case.ours.encode_rendered(text) if i != case.theirs.unk_id()]
        alone = b"".join(raw or said.encode() for said, raw in map(case.ours.alone, ids)).decode()
        assert alone == " " * (alone != case.ours.decode(ids)) + case.ours.decode(ids)

    same()


def test_same_vocabulary_in_a_gguf_file(case: Case, tmp_path: Path) -> None:
    vocabulary, _, _ = sentencepiece_tokenizer.read(case.directory / "tokenizer.model")
    if vocabulary.unigram or vocabulary.squeeze_spaces:
        pytest.skip("GGUF has only scores, and llama.cpp reads them as Llama's and Gemma's tokenizers")
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([p.text for p in vocabulary.pieces])
    writer.add_token_scores([p.score for p in vocabulary.pieces])
    writer.add_token_types([p.kind for p in vocabulary.pieces])
    writer.add_add_space_prefix(vocabulary.prefix_space)
    writer.add_bos_token_id(case.theirs.bos_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = stored(gguf_tokenizer.from_gguf(tmp_path / "t.gguf", gguf.GGUFReader(tmp_path / "t.gguf")), tmp_path)
    for text in _TEXT[:20]:
        assert ours.encode(text) == case.ours.encode(text)


def test_chat_text_has_its_control_tokens(case: Case, tmp_path: Path) -> None:
    for file in case.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pieces = case.theirs.get_piece_size()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "bos_token": {"content": "<s>"}, "chat_template": "unused",
        "added_tokens_decoder": {str(pieces): {"content": "<|new|>", "special": True}, "1": {"content": "<s>"}}}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}<|new|></s>")
    ours = stored(hf_tokenizer.read(tmp_path), tmp_path)
    text = ours.chat([{"role": "user", "content": "return"}])
    assert text == "<s>return<|new|></s>"
    ids = ours.encode_rendered(text)
    assert ids == (1, *case.theirs.encode("return"), pieces, 2)
    assert ours.encode("return") == tuple(case.theirs.encode("return"))
    assert ours.decode(ids) == "return"


def test_tokens_that_only_other_files_list_are_added(tmp_path: Path) -> None:
    """As somebody leaves the tokenizer.json of the model that was trained further."""
    (tmp_path / "tokenizer.json").write_text(gguf_tokenizer.bytes_only(259).tokenizer)
    config = {"added_tokens_decoder": {"256": {"content": "<|im_start|>"}, "260": {"content": "<|b|>", "rstrip": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": 259}))
    (tmp_path / "ours").mkdir()
    ours = stored(hf_tokenizer.read(tmp_path), tmp_path / "ours")
    assert ours.encode("a<|a|><|b|> b<|im_start|>") == (97, 259, 260, 98, 256)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": 270}))
    with pytest.raises(CheckpointError, match=r"lacks tokens with ids \[260, 270\], they should follow its 259"):
        hf_tokenizer.read(tmp_path)


def test_of_added_tokens_json_those_are_special_that_are_named_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(gguf_tokenizer.bytes_only(259).tokenizer)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 259, "<|pad|>": 260, "<tag>": 261}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({
        "eos_token": {"content": "<|end|>"}, "additional_special_tokens": ["<|pad|>"]}))
    (tmp_path / "ours").mkdir()
    ours = stored(hf_tokenizer.read(tmp_path), tmp_path / "ours")
    assert ours.decode(ours.encode("a<tag>b<|pad|><|end|>")) == "a<tag>b"


@pytest.mark.parametrize(("file", "text", "says"), [
    ("tokenizer.json", "{}", "cannot read .*tokenizer.json"), ("tokenizer.model", "\xff\xff", "not a SentencePiece"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object")])
def test_broken_tokenizer_files_are_named(tmp_path: Path, file: str, text: str, says: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        hf_tokenizer.read(tmp_path)


def test_no_tokenizer_is_no_error(tmp_path: Path) -> None:
    assert hf_tokenizer.read(tmp_path) is None


@pytest.mark.parametrize(("pre", "pieces"), [
    ("llama-bpe", ["He", "'ll", " say", " ", "123", "45", "!!\n\n", "  ", " x"]),
    ("qwen2", ["He", "'ll", " say", " ", "1", "2", "3", "4", "5", "!!\n\n", "  ", " x"])])
def test_text_is_cut_as_the_named_pre_tokenizer_does(pre: str, pieces: list[str]) -> None:
    cut = gguf_tokenizer._PRE_TOKENIZERS[pre]().pre_tokenize_str("He'll say 12345!!\n\n   x")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut] == pieces

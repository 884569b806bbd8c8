from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tokenizers
from toy import BOS, EOS, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from blitzjax.errors import CheckpointError, InvalidRequest
from blitzjax.serve.asking import generate_request
from blitzjax.serve.model import load_model
from blitzjax.serve.orders import prompt_of
from blitzjax.serve.tokenizer import IncrementalDecoder, StopStrings, Tokenizer

_TOY: list[Tokenizer] = []


@pytest.fixture(scope="module", autouse=True)
def toy(model_dir):
    _TOY[:] = [Tokenizer(model_dir)]
    return _TOY[0]


def test_emoji_split_over_tokens_comes_whole(toy):
    decoder = IncrementalDecoder(toy)
    assert [decoder.push((b,)) for b in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]


def test_others_work_while_a_long_text_is_tokenized(toy):
    """Some ten times at least; a thread that gets no time itself may miss that once, but not every time."""
    text, pauses = "abcd " * 100_000, []
    with ThreadPoolExecutor(1) as pool:
        while max(pauses, default=0) <= 10 and len(pauses) < 5:
            ids = pool.submit(toy.encode, text)
            pauses.append(0)
            while not ids.done():
                time.sleep(0.001)
                pauses[-1] += 1
            assert len(ids.result()) == len(text)
    assert max(pauses) > 10


def test_text_of_tokens_that_the_model_lacks_is_refused(model_dir, toy):
    """As "<image_soft_token>" is for Gemma 3's smaller models, whose tokenizer is that of the larger ones."""
    model, ids = load_model(model_dir), toy.encode("ab")

    def prompt(vocab: int) -> tuple[int, ...]:
        smaller = replace(model, spec=replace(model.spec, vocab=vocab))
        return asyncio.run(prompt_of(generate_request("ab", {}), smaller, 2000))[0]

    assert prompt(max(ids) + 1) == ids
    with pytest.raises(InvalidRequest, match=f"token id {max(ids)} is outside the vocabulary"):
        prompt(max(ids))


def test_special_tokens_are_skipped(toy):
    decoder = IncrementalDecoder(toy)
    assert decoder.push((BOS, ord("x"), EOS, ord("y"))) + decoder.flush() == "xy"


def test_incomplete_character_at_the_end_is_flushed_once(toy):
    decoder = IncrementalDecoder(toy)
    assert decoder.push("é".encode()[:1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_endless_undecodable_bytes_are_not_held_for_ever(toy):
    decoder = IncrementalDecoder(toy)
    assert "\ufffd" in decoder.push([0x80] * 100)


def test_prompt_that_ends_inside_a_character_is_completed(toy):
    first, second = "é".encode()
    assert IncrementalDecoder(toy, (ord("a"), first)).push((second,)) == "é"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=10), st.data())
def test_streamed_text_equals_text_decoded_at_once(prompt, text, data):
    prompt, ids = prompt.rstrip("\ufffd"), list(text.encode())
    decoder, pieces = IncrementalDecoder(_TOY[0], list(prompt.encode())), []
    while ids:
        n = data.draw(st.integers(1, len(ids)))
        pieces.append(decoder.push(ids[:n]))
        ids = ids[n:]
    assert "".join(pieces) + decoder.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_style_bytes_and_spaces(tmp_path):
    """Metaspace words with byte fallback: ▁ is a space, <0xNN> a byte; a run of bytes is decoded together."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    raw.save(str(tmp_path / "tokenizer.json"))
    decoder = IncrementalDecoder(Tokenizer(tmp_path), prompt=(1,))
    pieces = [decoder.push((t,)) for t in (2, *(b + 3 for b in "😀é".encode()), 2)]
    assert "".join(pieces) == " world😀é world"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_token_alone_has_bytes_where_it_is_no_character(toy):
    assert [toy.alone(b) for b in b"a\xc3"] == [("a", b""), ("\ufffd", b"\xc3")]
    assert b"".join(raw for _, raw in map(toy.alone, range(128, 256))) == bytes(range(128, 256))


def test_chat_template(toy):
    assert toy.chat([{"role": "user", "content": "hi"}]) == "u:hi;a"


def test_chat_template_has_the_globals_that_templates_use(tmp_path):
    template = ("{{ bos_token }}{{ strftime_now('%Y') | length }}{{ {'a': 'é<'} | tojson }}"
                "{% generation %}x{% endgeneration %}"
                "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    tokenizer = Tokenizer(write_model(tmp_path, template=template))
    assert tokenizer.chat([{"role": "user", "content": ""}]) == '<|bos|>4{"a": "é<"}x'
    with pytest.raises(InvalidRequest, match="no system role"):
        tokenizer.chat([{"role": "system", "content": ""}])


def test_chat_template_is_sandboxed(tmp_path):
    tokenizer = Tokenizer(write_model(tmp_path, template="{{ messages.append(1) }}{{ ''.__class__.__mro__ }}"))
    with pytest.raises(InvalidRequest):
        tokenizer.chat([{"role": "user", "content": ""}])


@pytest.mark.parametrize(("template", "says"), [
    ("{{ messages[0].content + 1 }}", "TypeError"), ("{% for i in range(10**9) %}x{% endfor %}", "Range too big")])
def test_a_chat_template_that_fails_is_the_requests_error(tmp_path, template, says):
    with pytest.raises(InvalidRequest, match=f"template failed on the messages: .*{says}"):
        Tokenizer(write_model(tmp_path, template=template)).chat([{"role": "user", "content": "x"}])


def test_model_without_chat_template_says_so(tmp_path):
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(write_model(tmp_path, template=None)).chat([{"role": "user", "content": ""}])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not parse"):
        Tokenizer(write_model(tmp_path, template="{% if %}"))


def naive_cut(text: str, stops: list[str]) -> tuple[str, str]:
    """Grows the text by characters until a stop string ends there; cuts before the longest such one."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[:end - len(longest)], longest
    return text, ""


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_stop_strings_cut_like_the_naive_search(chunks, stops):
    matcher, out = StopStrings(stops), ""
    text, hit = naive_cut("".join(chunks), stops)
    for chunk in chunks:
        out += matcher.push(chunk)
        assert text.startswith(out)  # nothing of a stop string ever gets out
    assert (out + matcher.flush(), matcher.hit) == (text, hit)


def test_text_is_held_back_no_longer_than_needed():
    matcher = StopStrings(["</end>"])
    assert [matcher.push(c) for c in ("hi <", "/", "b")] == ["hi ", "", "</b"]

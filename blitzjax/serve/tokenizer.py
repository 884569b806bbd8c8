"""Text to token ids and back: encoding, chat templates, streaming decoding, stop strings. No model code.

Invariant: what the streaming pieces emit, joined, never contains half a character, nor any part of a stop string.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

from blitzjax.errors import CheckpointError, InvalidRequest

_TEMPLATES = ("default", "tool_use")
_REPLACEMENT = "\ufffd"  # what decoders put where bytes are not (yet) a character
_SPACE = "▁"  # as SentencePiece writes it
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # as SentencePiece writes a token that is one byte
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that GPT-2's vocabularies write as themselves
_WRITTEN = {chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in _PRINTED)} | {chr(b): b for b in _PRINTED}
_MAX_HELD_TOKENS = 16  # a character has at most 4 bytes, so a longer run of undecodable tokens is never completed
_MAX_WINDOW_TOKENS = 64  # of which all but the last few have no text
_CHARACTER_BYTES = 4  # at most, in UTF-8
_CONTEXT_TOKENS = 6  # prompt tokens decoded along with the answer, so that its first space survives


class Tokenizer:
    """`tokenizer.json` and `tokenizer_config.json` of a checkpoint directory. Immutable after construction."""

    def __init__(self, directory: Path):
        """Raises CheckpointError when a file is missing or not readable."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as e:  # the Rust library raises bare Exception
            raise CheckpointError(f"cannot read {directory / 'tokenizer.json'}: {e}") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._names = {name: _token_text(config.get(name)) for name in names}
        self.special = {t for t, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        sources = _chat_templates(directory, config)
        self.tool_template = sources.get("tool_use", sources.get("default", ""))  # its text; for chats with tools
        self._templates = {name: _compile(text, directory) for name, text in sources.items() if name in _TEMPLATES}

    @property
    def bos(self) -> int | None:
        """The token that begins prompts, if its configuration names one."""
        return self._tokenizer.token_to_id(self._names["bos_token"])

    @staticmethod
    def present(directory: Path) -> bool:
        return (directory / "tokenizer.json").is_file()

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt, with the special tokens that the tokenizer itself adds (a leading BOS, say)."""
        return self._encode(text, True)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered chat template, which already contains its special tokens."""
        return self._encode(text, False)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """As a batch of one: unlike `encode`, that lets other threads run meanwhile."""
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: Sequence[int], shown: Collection[int] = ()) -> str:
        """Text without special tokens but the `shown` ones; undecodable bytes become U+FFFD."""
        kept = [token for token in ids if token not in self.special or token in shown] if shown else list(ids)
        return self._tokenizer.decode(kept, skip_special_tokens=not shown)

    def ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Of those texts that are tokens."""
        return {text: token for text in texts if (token := self._tokenizer.token_to_id(text)) is not None}

    def alone(self, token: int) -> tuple[str, bytes]:
        """A token's text, with its spaces: decoders take one from the beginning, for the first word of a text. And its
        bytes if it is no whole characters; empty where they are not known.
        """
        written, text = self._tokenizer.id_to_token(token) or "", self.decode((token,), shown=(token,))
        if spaces := len(written) - len(written.lstrip(_SPACE)):
            text = " " * spaces + text.lstrip(" ")
        if _REPLACEMENT not in text:
            return text, b""
        if _BYTE.fullmatch(written):
            return text, bytes.fromhex(written[3:5])
        return text, bytes(_WRITTEN[c] for c in written) if all(c in _WRITTEN for c in written) else b""

    def chat(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """Renders Hugging Face's messages and tools up to where the assistant speaks. Raises InvalidRequest."""
        template = self._templates.get("tool_use" if tools and "tool_use" in self._templates else "default")
        if template is None:
            raise InvalidRequest("this model has no chat template; send text (blitzjax chat --raw) or tokens instead of chat")
        try:
            return template.render(messages=list(messages), add_generation_prompt=True, tools=list(tools) or None,
                                   **self._names)
        except jinja2.TemplateError as e:
            raise InvalidRequest(f"the model's chat template refused the messages: {e}") from e
        except Exception as e:  # the template's own mistakes may raise anything
            raise InvalidRequest(f"the model's chat template failed on the messages: {type(e).__name__}: {e}") from e


class IncrementalDecoder:
    """Decodes one answer token by token. Owned by that answer.

    Tokens in [window, read) were emitted and are decoded again only as context for [read, len): joining and spacing
    depend on neighbours. `sent` characters of the window's text were emitted.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), shown: Collection[int] = ()):
        """`shown`: special tokens that are part of the text."""
        self._decode = lambda ids: tokenizer.decode(ids, shown)
        start, stop = _context(tokenizer, prompt)
        self._ids = list(prompt[start:])
        self._window, self._read = 0, stop - start
        self._sent = len(self._decode(prompt[start:stop]).rstrip(_REPLACEMENT))

    def push(self, ids: Sequence[int]) -> str:
        """Text that became final with these tokens, possibly empty."""
        out = ""
        for token in ids:
            self._ids.append(token)
            out += self._advance(final=len(self._ids) - self._read >= _MAX_HELD_TOKENS)
        return out

    def flush(self) -> str:
        """What was held back; at the end an incomplete character is U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._ids[self._window:])
        whole = text if final else text.rstrip(_REPLACEMENT)
        fresh = whole[self._sent:]
        self._sent = max(self._sent, len(whole))
        if whole == text:  # nothing is pending: slide the window
            if self._decode(self._ids[self._read:]) or len(self._ids) - self._window > _MAX_WINDOW_TOKENS:
                self._window = self._read  # tokens without text are no context: the next one's space would go as first
            self._read = len(self._ids)
            self._sent = len(self._decode(self._ids[self._window:]))
        return fresh


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[int, int]:
    """[start, stop) of the prompt's last tokens that are whole characters.

    A prompt may end inside a character (a continued answer, say); then the answer shows all of it.
    """
    size = len(prompt)
    for stop in range(size, max(0, size - _CHARACTER_BYTES), -1):
        for start in range(stop - _CONTEXT_TOKENS, stop - _CONTEXT_TOKENS - _CHARACTER_BYTES, -1):
            if _REPLACEMENT not in tokenizer.decode(prompt[max(0, start):stop]):
                return max(0, start), stop
    return max(0, size - _CONTEXT_TOKENS), size


class StopStrings:
    """Ends an answer where a stop string first becomes complete. Owned by that answer.

    The answer is cut before the longest stop string that ends there, whatever the chunks: the same text always gives
    the same cut.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(stops)
        self._held = ""
        self.hit = ""  # the stop string that is complete, none of which is empty

    def push(self, text: str) -> str:
        """Text that cannot be part of a stop string any more; sets `hit` and drops the rest when one is complete."""
        if self.hit:
            return ""
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.hit = min(ends)
            cut, self._held = self._held[:at], ""
            return cut
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        return out

    def flush(self) -> str:
        """What was held back; the answer ends without a stop string."""
        out, self._held = self._held, ""
        return out


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _read_json(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e


def _token_text(token: object) -> str:
    """Hugging Face writes a special token as its text or as {"content": text}."""
    return token if isinstance(token, str) else str(token.get("content", "")) if isinstance(token, dict) else ""


def _chat_templates(directory: Path, config: Mapping[str, object]) -> dict[str, str]:
    """By name, of which most models have "default" alone, and some "tool_use"."""
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}]
        return {item["name"]: item["template"] for item in template}
    if template is None and (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text("utf-8")
    return {"default": template} if isinstance(template, str) else {}


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; rendering ignores it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, directory: Path) -> jinja2.Template:
    """The environment that Hugging Face templates expect: trimmed blocks, three extra globals."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as e:
        raise CheckpointError(f"the chat template in {directory} does not parse: {e}") from e


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

"""What may follow in an answer, and how do others run meanwhile? llguidance's C interface, in its wheel.

Its classes for Python hold Python's lock while they read a tokenizer: 0.3 s for SmolLM2, 3 s for Gemma's 262,144
tokens. Names and fields are those of llguidance.h. Invariant: what was made here is freed once, when nobody can reach it.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_void_p

import numpy as np

_NO_TOKEN = 0xFFFFFFFF
_ERROR_BYTES = 1024


class _TokenizerInit(ctypes.Structure):
    """LlgTokenizerInitV2."""

    _fields_ = (("struct_size", c_size_t), ("vocab_size", c_uint32), ("tok_eos", c_uint32), ("token_lens", c_void_p),
                ("token_bytes", c_void_p), ("tokenizer_json", c_char_p), ("tokenize_assumes_string", c_bool),
                ("tokenize_fn", c_void_p), ("use_approximate_greedy_tokenize_fn", c_bool),
                ("tokenize_user_data", c_void_p), ("slices", c_void_p), ("tok_eos_extra", ctypes.POINTER(c_uint32)),
                ("tok_eos_extra_count", c_uint32))


class _ConstraintInit(ctypes.Structure):
    """LlgConstraintInit; its end, limits, stays as llguidance fills it."""

    _fields_ = (("tokenizer", c_void_p), ("log_buffer_level", c_uint32), ("log_stderr_level", c_uint32),
                ("limits", c_uint32 * 64))


class _Library:
    """Functions that may take long let other threads run; the others are faster than that would be."""

    def __init__(self) -> None:
        from llguidance import _lib

        path = str(_lib.__file__)
        long, short = ctypes.CDLL(path), ctypes.PyDLL(path)
        self.new_tokenizer = _declared(long.llg_new_tokenizer_v2, c_void_p, c_void_p, c_char_p, c_size_t)
        self.new_matcher = _declared(long.llg_new_matcher, c_void_p, c_void_p, c_char_p, c_char_p)
        self.compute_mask_into = _declared(long.llg_matcher_compute_mask_into, c_int32, c_void_p, c_void_p, c_size_t)
        self.consume_token = _declared(short.llg_matcher_consume_token, c_int32, c_void_p, c_uint32)
        self.get_mask_byte_size = _declared(short.llg_matcher_get_mask_byte_size, c_size_t, c_void_p)
        self.is_stopped = _declared(short.llg_matcher_is_stopped, c_bool, c_void_p)
        self.get_error = _declared(short.llg_matcher_get_error, c_char_p, c_void_p)
        self.clone_matcher = _declared(short.llg_clone_matcher, c_void_p, c_void_p)
        self.set_defaults = _declared(short.llg_constraint_init_set_defaults, None, c_void_p, c_void_p)
        self.free_tokenizer = _declared(short.llg_free_tokenizer, None, c_void_p)
        self.free_matcher = _declared(short.llg_free_matcher, None, c_void_p)


def _declared(function: Callable[..., object], result: object, *arguments: object) -> Callable:
    function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return function


@functools.cache
def _library() -> _Library:
    return _Library()


class Tokenizer:
    """Immutable; any thread may use it."""

    def __init__(self, tokenizer_json: str, eos_token_ids: Sequence[int]):
        """Raises ValueError."""
        first, *more = eos_token_ids or (_NO_TOKEN,)
        init = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit), tok_eos=first, tokenizer_json=tokenizer_json.encode(),
            use_approximate_greedy_tokenize_fn=True,  # only asked where one text must follow, and then not relied on
            tok_eos_extra=(c_uint32 * len(more))(*more), tok_eos_extra_count=len(more))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self.handle = _library().new_tokenizer(ctypes.byref(init), error, len(error))
        if not self.handle:
            raise ValueError(error.value.decode(errors="replace"))
        weakref.finalize(self, _library().free_tokenizer, self.handle)


class Matcher:
    """A place in a grammar. Owned by one thread at a time."""

    def __init__(self, handle: int):
        self._handle = handle
        weakref.finalize(self, _library().free_matcher, handle)

    @staticmethod
    def begin(tokenizer: Tokenizer, grammar: str) -> Matcher:
        """At the beginning; `grammar` is Lark, or JSON with "grammars". `error` says if it has mistakes."""
        init = _ConstraintInit()
        _library().set_defaults(ctypes.byref(init), tokenizer.handle)
        init.log_stderr_level = 0
        return Matcher(_library().new_matcher(ctypes.byref(init), b"guidance", grammar.encode()))

    def copy(self) -> Matcher:
        return Matcher(_library().clone_matcher(self._handle))

    @property
    def error(self) -> str:
        """Empty, or why there is no going on."""
        return (_library().get_error(self._handle) or b"").decode(errors="replace")

    @property
    def stopped(self) -> bool:
        """What was said is whole, and nothing can follow."""
        return _library().is_stopped(self._handle)

    def push(self, token: int) -> None:
        _library().consume_token(self._handle, token)

    def allowed(self) -> np.ndarray:
        """u32[words], a bit for each token of the vocabulary that may follow; after an error, none."""
        words = np.zeros(_library().get_mask_byte_size(self._handle) // 4, np.uint32)
        _library().compute_mask_into(self._handle, words.ctypes.data, words.nbytes)
        return words

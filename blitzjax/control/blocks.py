"""Which KV pages of one instance belong to which request, and which still hold the KV of a known prefix? Ids only.

A page is a pure function of the tokens up to its end, so it is known by a key of all of them (control/prefixes.py) and
several requests may own it. Invariant: every page is free, idle (no owner, but its key may be hit again) or owned; idle
pages count as free, and the least recently used one is taken when no other is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from blitzjax.config import Config, EngineConfig
from blitzjax.control.prefixes import PageKey
from blitzjax.types import Request, RequestId


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens of KV."""
    return -(-tokens // page_size)


def admitted_tokens(request: Request, answer_share: float) -> int:
    """Tokens that must have pages before a request runs: its prompt and a share of the answer that it may give."""
    return request.prompt_tokens + ceil(answer_share * request.max_tokens)


def answer_share(config: Config) -> float:
    """Of `max_tokens`, for `admitted_tokens`. All of it with split roles: what is on its way must find room."""
    return config.engine.answer_share if config.scale.roles == "mixed" else 1.0


def pages_of(engine: EngineConfig) -> int:
    """KV pages of one instance: configured, or every slot at full length."""
    return engine.kv_pages or engine.max_num_seqs * pages_for(engine.max_model_len, engine.page_size)


class PageLedger:
    """Pages 0..pages-1 of `page_size` tokens, of which at most `keyed` have a key. Mutated by its Batcher only."""

    def __init__(self, pages: int, page_size: int, keyed: int = 0) -> None:
        assert pages >= 0 and page_size >= 1
        self.pages = pages
        self.page_size = page_size
        self.forgotten: list[PageKey] = []  # keys that can be hit no more; the reader empties it
        self._limit = min(keyed, pages)
        self._fresh = 0  # pages [fresh, pages) were never used
        self._returned: list[int] = []  # a stack
        self._owned: dict[RequestId, list[int]] = {}
        self._owners: dict[int, int] = {}  # how many, of owned pages with a key; others have one
        self._pages: dict[PageKey, int] = {}
        self._keys: dict[int, PageKey] = {}
        self._idle: dict[int, None] = {}  # the least recently used first

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self._fresh - len(self._returned) - len(self._idle)

    @property
    def free(self) -> int:
        return self.pages - self.used

    def fits(self, tokens: int, hit: Sequence[int] = ()) -> bool:
        """Whether `tokens` more tokens can be reserved now, the first of them in the pages `hit`."""
        idle = sum(page in self._idle for page in hit)
        return pages_for(tokens, self.page_size) - len(hit) <= self.free - idle

    def could_fit(self, tokens: int) -> bool:
        """Whether `tokens` tokens fit into the empty ledger."""
        return pages_for(tokens, self.page_size) <= self.pages

    def reserve(self, request_id: RequestId, tokens: int, hit: Sequence[int] = ()) -> bool:
        """Gives `request_id` pages for `tokens` tokens, the first of them `hit`, which `find` returned. False, and
        nothing changes, when they are not free.
        """
        assert request_id not in self._owned, f"{request_id} reserves twice"
        if not self.fits(tokens, hit):
            return False
        for page in hit:
            self._idle.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1
        fresh = self._take(pages_for(tokens, self.page_size) - len(hit))
        self._owned[request_id] = [*hit, *fresh]
        return True

    def grow(self, request_id: RequestId, tokens: int) -> bool:
        """Gives more pages, so that `tokens` tokens have some. False, and nothing changes, when they are not free."""
        owned = self._owned[request_id]
        more = pages_for(tokens, self.page_size) - len(owned)
        if more > self.free:
            return False
        owned += self._take(max(0, more))
        return True

    def held_tokens(self, request_id: RequestId) -> int:
        """How many tokens the request's pages suffice for."""
        return len(self._owned[request_id]) * self.page_size

    def release(self, request_id: RequestId) -> None:
        """Takes the pages back; a request without pages is ignored. Pages with a key become idle, of a prefix the last
        ones first, since without the first ones they cannot be hit.
        """
        pages = self._owned.pop(request_id, [])
        if not self._owners:
            self._returned += reversed(pages)
            return
        for page in reversed(pages):
            if page not in self._owners:
                self._returned.append(page)
            elif self._owners[page] > 1:
                self._owners[page] -= 1
            else:
                del self._owners[page]
                self._idle[page] = None

    def find(self, keys: Sequence[PageKey]) -> tuple[int, ...]:
        """The pages that hold the longest known prefix of `keys`."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def remember(self, request_id: RequestId, keys: Sequence[PageKey]) -> tuple[int, ...]:
        """The request's first pages are full and are known by `keys` from now on, as far as `keyed` allows.
        → which of `keys`, by index, were not known before: their content must be kept until they are `forgotten`.
        """
        news = []
        for index, (page, key) in enumerate(zip(self._owned[request_id], keys, strict=False)):
            if key in self._pages:
                continue
            assert page not in self._keys, f"page {page} holds something else"
            if len(self._keys) >= self._limit and not self._forget_idle():
                break
            self._pages[key], self._keys[page], self._owners[page] = page, key, 1
            news.append(index)
        return tuple(news)

    def known(self) -> set[PageKey]:
        return set(self._pages)

    def owned(self, request_id: RequestId) -> tuple[int, ...]:
        """The request's pages, in token order; empty without a reservation."""
        return tuple(self._owned.get(request_id, ()))

    def holders(self) -> frozenset[RequestId]:
        return frozenset(self._owned)

    def check(self) -> None:
        """Asserts the invariant."""
        owned = [page for pages in self._owned.values() for page in pages]
        assert all(len(set(pages)) == len(pages) for pages in self._owned.values())
        assert self._owners == {page: owned.count(page) for page in set(owned) if page in self._keys}
        ids = sorted([*range(self._fresh, self.pages), *self._returned, *self._idle, *set(owned)])
        assert ids == list(range(self.pages)), "a page is lost or in two places"
        assert self._pages == {key: page for page, key in self._keys.items()}
        assert len(self._keys) == len(self._pages) <= self._limit
        assert self._keys.keys() == self._idle.keys() | self._owners.keys()
        assert all(page in self._owners or owned.count(page) == 1 for page in set(owned)), "shared without a key"

    # ----------------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        while len(self._returned) + self.pages - self._fresh < count:
            self._forget_idle()
        again = min(count, len(self._returned))
        pages = self._returned[: -again - 1 : -1]
        del self._returned[len(self._returned) - again:]
        pages += range(self._fresh, self._fresh + count - again)
        self._fresh += count - again
        return pages

    def _forget_idle(self) -> bool:
        """Makes the least recently used idle page a free one. False when there is none."""
        page = next(iter(self._idle), None)
        if page is None:
            return False
        key = self._keys.pop(page)
        del self._idle[page], self._pages[key]
        self._returned.append(page)
        self.forgotten.append(key)
        return True

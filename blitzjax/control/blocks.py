"""Which KV pages of one instance belong to which request? Ids only, never arrays.

Invariant: every page is free or owned by exactly one request.
"""

from __future__ import annotations

from blitzjax.types import RequestId


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens of KV."""
    return -(-tokens // page_size)


class PageLedger:
    """Pages 0..pages-1 of `page_size` tokens. Mutated by its Batcher only."""

    def __init__(self, pages: int, page_size: int) -> None:
        assert pages >= 0 and page_size >= 1
        self.pages = pages
        self.page_size = page_size
        self._fresh = 0  # pages [fresh, pages) were never used
        self._returned: list[int] = []  # a stack
        self._owned: dict[RequestId, tuple[int, ...]] = {}

    @property
    def used(self) -> int:
        return self._fresh - len(self._returned)

    @property
    def free(self) -> int:
        return self.pages - self.used

    def fits(self, tokens: int) -> bool:
        """Whether `tokens` more tokens can be reserved now."""
        return pages_for(tokens, self.page_size) <= self.free

    def could_fit(self, tokens: int) -> bool:
        """Whether `tokens` tokens fit into the empty ledger."""
        return pages_for(tokens, self.page_size) <= self.pages

    def reserve(self, request_id: RequestId, tokens: int) -> bool:
        """Gives `request_id` pages for `tokens` tokens. False, and nothing changes, when they are not free."""
        assert request_id not in self._owned, f"{request_id} reserves twice"
        if not self.fits(tokens):
            return False
        count = pages_for(tokens, self.page_size)
        again = min(count, len(self._returned))
        pages = self._returned[len(self._returned) - again:]
        del self._returned[len(self._returned) - again:]
        self._owned[request_id] = (*reversed(pages), *range(self._fresh, self._fresh + count - again))
        self._fresh += count - again
        return True

    def release(self, request_id: RequestId) -> None:
        """Takes the pages back; a request without pages is ignored."""
        self._returned.extend(reversed(self._owned.pop(request_id, ())))

    def owned(self, request_id: RequestId) -> tuple[int, ...]:
        """The request's pages, in token order; empty without a reservation."""
        return self._owned.get(request_id, ())

    def holders(self) -> frozenset[RequestId]:
        return frozenset(self._owned)

    def check(self) -> None:
        """Asserts the invariant."""
        owned = [page for pages in self._owned.values() for page in pages]
        ids = sorted([*range(self._fresh, self.pages), *self._returned, *owned])
        assert ids == list(range(self.pages)), "a page is lost or owned twice"

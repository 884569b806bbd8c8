"""Which layer of which request does each side of a live pair run next?

The queue lives on the NEW instance, whose layers are still arriving. NEW runs single layers of queued items; OLD, which
has every layer, pulls the item that should end first and runs the rest. ZigZag (BlitzScale, section 5.2 and figure 16)
returns to older items as layers arrive; best effort visits each item once.

Invariant: layers of an item run in order, each exactly once, on one side at a time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from blitzjax.types import LiveMode

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Handed(Generic[T]):
    """OLD owns `item` now: layers [0, next_layer) were run by NEW, OLD runs [next_layer, L)."""

    item: T
    next_layer: int


@dataclass(frozen=True, slots=True)
class Wait:
    """NEW is inside a layer of the item that OLD should get: ask again after `ran`."""


@dataclass(slots=True)
class _Progress:
    done: int = 0  # layers [0, done) were run
    share: int | None = None  # best effort: NEW stops after this many layers; None: not visited yet
    ready: bool = True  # NEW has what the first layer works on
    rank: tuple[float, ...] = ()  # lower is older


class LiveQueue(Generic[T]):
    """Items of one live pair, oldest first. Mutated by the NEW side only; OLD's pulls arrive there as messages.

    An item leaves the queue by `pull` (OLD runs the rest), by `ran` of its last layer (NEW keeps it), or by `remove`.
    """

    def __init__(self, layers: int, mode: LiveMode) -> None:
        assert layers >= 1 and mode in ("zigzag", "best_effort")
        self._layers = layers
        self._mode = mode
        self._loaded = 0
        self._closed = False
        self._items: dict[T, _Progress] = {}  # oldest first
        self._executing: T | None = None
        self._kept: T | None = None  # best effort, all layers loaded: the item that NEW runs to its end

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    @property
    def items(self) -> tuple[T, ...]:
        """Everything still queued, oldest first."""
        return tuple(self._items)

    @property
    def complete(self) -> bool:
        """Whether NEW holds every layer."""
        return self._loaded == self._layers

    @property
    def drained(self) -> bool:
        """All layers are here and OLD can get nothing any more: the pair may end."""
        return self.complete and self.pull_would_give() is None

    def add(self, item: T, ready: bool = True, rank: tuple[float, ...] = ()) -> None:
        """Queues `item` behind everything of a lower or equal `rank`; NEW runs it once it is `ready`, OLD any time."""
        assert item not in self._items, f"{item} is queued twice"
        self._items[item] = _Progress(ready=ready, rank=rank)
        self._items = dict(sorted(self._items.items(), key=lambda entry: entry[1].rank))  # stable

    def ready(self, item: T) -> None:
        """NEW may run `item` from now on; unknown ones are ignored."""
        if item in self._items:
            self._items[item].ready = True

    def loaded(self, layers: int) -> None:
        """Layers [0, layers) are on NEW. The watermark never goes back."""
        assert layers <= self._layers
        self._loaded = max(self._loaded, layers)

    def close(self) -> None:
        """OLD is gone: `pull` gives nothing any more and NEW runs every item as its layers allow."""
        self._closed = True

    def remove(self, item: T) -> None:
        """Forgets an aborted item; unknown ones are ignored. A layer in progress may still be reported with `ran`."""
        self._items.pop(item, None)
        if self._kept == item:
            self._kept = None

    def next(self) -> tuple[T, int] | None:
        """The one layer that NEW should run now, as (item, layer), or None. Marks it executing until `ran`."""
        assert self._executing is None, f"{self._executing} is still executing"
        item = self._choose_zigzag() if self._mode == "zigzag" or self._closed else self._choose_best_effort()
        if item is None:
            return None
        self._executing = item
        return item, self._items[item].done

    def ran(self, item: T) -> bool:
        """The layer given by `next` was run. True: it was the last one, the item left the queue and NEW keeps it."""
        assert self._executing == item, f"{item} is not executing"
        self._executing = None
        progress = self._items.get(item)
        if progress is None:  # removed meanwhile
            return False
        progress.done += 1
        if progress.done < self._layers:
            return False
        self.remove(item)
        return True

    def pull(self) -> Handed[T] | Wait | None:
        """OLD asks for its next item: hands it over, tells OLD to ask again, or has nothing (see `drained`)."""
        offer = self.pull_would_give()
        if isinstance(offer, Handed):
            self.remove(offer.item)
        return offer

    def pull_would_give(self) -> Handed[T] | Wait | None:
        """What `pull` would answer now, without handing anything over."""
        if self._closed:
            return None
        candidates = self._later_items() if self.complete else list(self._items)[:1]
        for item in candidates:
            if not self._busy(item):
                return Handed(item, self._items[item].done)
        return Wait() if candidates else None

    # ----------------------------------------------------------------------------------------------------------------

    def _later_items(self) -> list[T]:
        """All layers are loaded, both sides serve whole items: everything but the one that NEW is finishing."""
        mine = self._kept if self._mode == "best_effort" else self._started_head()
        return [item for item in self._items if item != mine]

    def _started_head(self) -> T | None:
        head = next(iter(self._items), None)
        return head if head is not None and (self._items[head].done or head == self._executing) else None

    def _busy(self, item: T) -> bool:
        """NEW is inside a layer of `item`, or (best effort, loading) inside its share."""
        share = self._items[item].share
        in_share = self._mode == "best_effort" and share is not None and self._items[item].done < share
        return item == self._executing or (in_share and not self.complete)

    def _choose_zigzag(self) -> T | None:
        """The oldest item that has a loaded layer which was not run (figure 16)."""
        return next((item for item, p in self._items.items() if p.ready and p.done < self._loaded), None)

    def _choose_best_effort(self) -> T | None:
        """FCFS, each item once, T_i = min(layers loaded when NEW reaches i, L/2) layers (section 5.2)."""
        if self.complete:
            return self._keep_one()
        for item, progress in self._items.items():
            if not progress.ready:
                continue
            if progress.share is None:
                progress.share = min(self._loaded, self._layers // 2) if self._loaded else None
            if progress.share is not None and progress.done < progress.share:
                return item
        return None

    def _keep_one(self) -> T | None:
        """Once loaded, NEW finishes items alone; the oldest item that has had its share is OLD's next one."""
        if self._kept is None:
            visited = next((item for item, progress in self._items.items() if progress.share is not None), None)
            self._kept = next((item for item in self._items if item != visited), None)
        return self._kept

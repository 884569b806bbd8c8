"""How many prompt tokens a second does one instance of a model run? Learned from when first tokens come.

Counted is the time in which an instance was known to have prompts to run: from the assignment to an instance without
any, over one first token after the other, until it has none left. Decode steps in between count, as they do for whoever
waits. Invariant: the same events in the same order give the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.types import InstanceId

FIRST_TOKENS_PER_S = 1000.0  # believed before anything was seen, as if seen for a second
_REMEMBERED_S = 20.0  # of prompt work, whoever did it: what is older fades


@dataclass(slots=True)
class Pace:
    """Of one model. Told by its Service."""

    _tokens: float = FIRST_TOKENS_PER_S
    _seconds: float = 1.0
    _since: dict[InstanceId, float] = field(default_factory=dict)  # it has run its next prompt since

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds

    def began(self, instance: InstanceId, at: float) -> None:
        """A whole instance that had no prompt to run has one."""
        self._since[instance] = at

    def ran(self, instance: InstanceId, at: float, tokens: int, more: bool) -> None:
        """A prompt's first token is here; `more`: others wait there."""
        since = self._since.pop(instance, None)
        if since is None:
            return
        self._tokens += tokens
        self._seconds += max(0.0, at - since)
        if self._seconds > _REMEMBERED_S:
            fade = _REMEMBERED_S / self._seconds
            self._tokens, self._seconds = self._tokens * fade, self._seconds * fade
        if more:
            self._since[instance] = at

    def unknown(self, instance: InstanceId) -> None:
        """What it runs until it has nothing more is not its own pace: parameters arrive, or a partner helps."""
        self._since.pop(instance, None)

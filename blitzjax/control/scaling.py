"""How many instances should serve, and which ones come or go to get there?

`reconcile` compares the goal with the fleet after every event and takes the next steps, so nothing that was lost, late
or repeated needs a case of its own. Invariant: the last serving instance never drains.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.config import Config
from blitzjax.control import autoscale
from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.load import Load
from blitzjax.control.provision import Means, Provisioner
from blitzjax.control.requests import RequestBook
from blitzjax.types import Command, Phase, Release, ScaleRequested

MAX_FAILURES = 3  # of one instance's transfers within a scale-up
RETRY_S = 10.0  # an instance that was given up is not tried again before


@dataclass(frozen=True, slots=True)
class Goal:
    target: int
    means: Means
    held_until: float = float("-inf")  # the policy leaves an operator's wish alone before this time


class Scaler:
    """Owns the goal; changes phases to approach it."""

    def __init__(self, config: Config, fleet: Fleet, book: RequestBook, provisioner: Provisioner) -> None:
        self._config = config
        self._fleet = fleet
        self._book = book
        self._provisioner = provisioner
        self._means = Means(config.scale.live, config.scale.source)
        self._memory = autoscale.Memory()
        self.goal = Goal(config.scale.min_instances, self._means)

    # ---- what is wanted

    def request(self, event: ScaleRequested) -> None:
        """An operator's wish, within [1, instances]; it stands for `down_after_s` whatever the load is."""
        pool = max(len(self._fleet.members), self._config.cluster.pool)
        means = Means(event.live or self._means.live, event.source or self._means.source)
        self.goal = Goal(max(1, min(event.target, pool)), means, event.at + self._config.scale.down_after_s)
        self._memory = autoscale.Memory()
        for member in self._fleet.members.values():
            member.failures, member.barred_until = 0, float("-inf")

    def tick(self, at: float) -> None:
        """Lets the policy look at the load."""
        if self._config.scale.policy != "auto" or at < self.goal.held_until or not self._fleet.members:
            return
        target, self._memory = autoscale.step(self.load(at), self._memory, self._config.scale)
        if target != self.goal.target:
            self.goal = Goal(target, self._means)

    def load(self, at: float) -> Load:
        return Load(at, self._fleet.counted(), self._book.total_backlog_tokens, self._book.total_pages,
                    self._fleet.pages)

    # ---- getting there

    def reconcile(self, at: float) -> list[Command]:
        """The next steps towards the goal. Repeating it without a new event does nothing."""
        commands = self._give_up_hopeless(at)
        self._revive()
        commands += self._cancel_excess()
        self._drain_excess()
        commands += self._release_drained()
        stranded = self._provisioner.stranded()
        needy = stranded + self._recruits(at)
        commands += self._provisioner.provide(at, needy, self.goal.means)
        if not needy and not self._fleet.loading():
            self.goal = Goal(self.goal.target, self._means, self.goal.held_until)
        return commands

    def _give_up_hopeless(self, at: float) -> list[Command]:
        """Releases stranded instances whose transfers failed too often, and asks for fewer instances."""
        commands: list[Command] = []
        for member in self._provisioner.stranded():
            if member.failures >= MAX_FAILURES:
                self.goal = Goal(max(1, self.goal.target - 1), self.goal.means, self.goal.held_until)
                member.failures, member.barred_until = 0, at + RETRY_S
                commands += self._abandon(member, f"{member.id} could not load the model")
        return commands

    def _abandon(self, member: Member, why: str) -> list[Command]:
        """A loading instance stops: its requests run elsewhere (Release makes it forget them)."""
        commands = self._provisioner.unpair(member.id, lost=False)
        for entry in [*self._book.owned(member.id), *self._book.given(member.id)]:
            commands += self._book.lose(entry, why)
        return commands + [self._release(member)]

    def _revive(self) -> None:
        """Instances that still drain hold every unit: nothing is faster than keeping them."""
        for member in self._fleet.in_phase(Phase.DRAINING):
            missing = self._fleet.counted() < self.goal.target or not self._fleet.count(Phase.SERVING)
            if missing and not member.releasing:
                member.move(Phase.SERVING)

    def _excess(self) -> int:
        return self._fleet.counted() - self.goal.target

    def _cancel_excess(self) -> list[Command]:
        """Instances whose transfer broke and that nobody needs any more do not get another one."""
        commands: list[Command] = []
        for member in self._provisioner.stranded():
            idle = member.phase is Phase.LOADING and not self._book.owns(member.id)
            if idle and self._excess() > 0 and self._fleet.count(Phase.SERVING):
                commands += self._abandon(member, "scaled down")
        return commands

    def _drain_excess(self) -> None:
        """The instances with the fewest requests take nothing new."""
        while self._excess() > 0:
            serving = self._fleet.in_phase(Phase.SERVING)
            able = [m for m in serving
                    if self._provisioner.pairs.of(m.id) is None and not self._provisioner.transfers.busy(m.id)]
            if len(serving) <= 1 or not able:
                return
            min(able, key=lambda m: self._book.owns(m.id)).move(Phase.DRAINING)

    def _release_drained(self) -> list[Command]:
        return [self._release(m) for m in self._fleet.in_phase(Phase.DRAINING)
                if not m.releasing and not self._book.owns(m.id)]

    def _release(self, member: Member) -> Command:
        member.release()
        return Release(member.id)

    def _recruits(self, at: float) -> list[Member]:
        """As many IDLE instances as are missing: in the world first, then those that hold most."""
        if self._excess() >= 0:
            return []
        idle = [m for m in self._fleet.in_phase(Phase.IDLE) if at >= m.barred_until]
        idle.sort(key=lambda m: (not m.in_world, -m.units, m.id))
        return idle[: -self._excess()]

"""How many instances should serve, and which ones come or go to get there?

`reconcile` compares the goal with the fleet after every event and takes the next steps, so nothing that was lost, late
or repeated needs a case of its own. Invariant: the last serving instance never drains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from blitzjax.config import Config
from blitzjax.control import autoscale
from blitzjax.control.executor import MATRIX, Action
from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.load import Load
from blitzjax.control.provision import Means, Provisioner
from blitzjax.control.requests import RequestBook
from blitzjax.types import Command, InstanceId, Phase, Release, Role, ScaleRequested

MAX_FAILURES = 3  # of one instance's transfers within a scale-up
RETRY_S = 10.0  # an instance that was given up is not tried again before


@dataclass(frozen=True, slots=True)
class Goal:
    """How many instances of each role there should be: of prefill and decode, or of mixed ones and none."""

    prefill: int
    decode: int
    means: Means
    held_until: float = float("-inf")  # the policy leaves an operator's wish alone before this time

    @property
    def target(self) -> int:
        return self.prefill + self.decode


class Scaler:
    """Owns the goal; changes phases and roles to approach it. `receiving(i)`: KV is on its way to i."""

    def __init__(self, config: Config, fleet: Fleet, book: RequestBook, provisioner: Provisioner,
                 receiving: Callable[[InstanceId], bool]) -> None:
        self._config = config
        self._fleet = fleet
        self._book = book
        self._provisioner = provisioner
        self._receiving = receiving
        self._means = Means(config.scale.live, config.scale.source)
        self._memory = self._decode_memory = autoscale.Memory()
        self._split = config.scale.roles == "split"
        self._prefill = Role.PREFILL if self._split else Role.MIXED  # the role of instances that run prompts
        self._settled: tuple[int, int, Goal] | None = None  # versions at which there was nothing left to do
        self.goal = Goal(config.scale.min_instances, config.scale.min_decode if self._split else 0, self._means)

    # ---- what is wanted

    def request(self, event: ScaleRequested) -> None:
        """An operator's wish, within [1, instances]; it stands for `down_after_s` whatever the load is.

        With split roles it is about all instances; those that decode stay as many as they are, if that leaves one.
        """
        pool = max(len(self._fleet.members), self._config.cluster.pool)
        means = Means(event.live or self._means.live, event.source or self._means.source)
        target = max(1 + self._split, min(event.target, pool))
        decode = min(self.goal.decode, target - 1)
        self.goal = Goal(target - decode, decode, means, event.at + self._config.scale.down_after_s)
        self._memory = self._decode_memory = autoscale.Memory()
        for member in self._fleet.members.values():
            member.failures, member.barred_until = 0, float("-inf")

    def tick(self, at: float) -> None:
        """Lets the policy look at the load."""
        if self._config.scale.policy != "auto" or at < self.goal.held_until or not self._fleet.members:
            return
        load, decode = self.load(at), 0
        if self._split:
            (prefill, self._memory), (decode, self._decode_memory) = autoscale.step_split(
                load, self._memory, self._decode_memory, self._config.scale)
        else:
            prefill, self._memory = autoscale.step(load, self._memory, self._config.scale)
        if (prefill, decode) != (self.goal.prefill, self.goal.decode):
            self.goal = Goal(prefill, decode, self._means)

    def load(self, at: float) -> Load:
        held = sum(self._book.pages(m.id) * m.page_size for m in self._fleet.serving(Role.PREFILL))  # mixed: none
        return Load(at, self._fleet.counted(self._prefill), self._book.total_backlog_tokens, self._book.total_pages,
                    self._fleet.pages, self._fleet.counted(Role.DECODE), held)

    def place(self, member: Member) -> None:
        """Gives an instance that joined its role: what is missing, prefill first."""
        missing = self._missing(self._prefill), self._missing(Role.DECODE)
        decodes = member.phase is Phase.SERVING and missing[1] > 0 and missing[0] <= 0
        member.assume(Role.DECODE if decodes else self._prefill)

    # ---- getting there

    def reconcile(self, at: float) -> list[Command]:
        """The next steps towards the goal. Repeating it without a new event does nothing."""
        state = (self._fleet.version, self._provisioner.transfers.version, self.goal)
        if state == self._settled:
            return []
        commands = self._give_up_hopeless(at)
        if not self._fleet.count(Phase.SERVING):
            self._revive(self._prefill, 1)
        signs = _sign(self._missing(self._prefill)), _sign(self._missing(Role.DECODE))
        recruits: list[Member] = []
        for action in MATRIX[signs]:
            match action:
                case Action.REVIVE_PREFILL:
                    self._revive(self._prefill, self._missing(self._prefill))
                case Action.REVIVE_DECODE:
                    self._revive(Role.DECODE, self._missing(Role.DECODE))
                case Action.MUTATE:
                    self._mutate()
                case Action.REUSE_DECODE:
                    self._reuse_decode()
                case Action.RECRUIT:
                    recruits = self._recruits(at)
                case Action.DRAIN_PREFILL:
                    commands += self._drain(self._prefill)
                case Action.DRAIN_DECODE:
                    commands += self._drain(Role.DECODE)
                case _:
                    assert_never(action)
        commands += self._release_drained()
        needy = self._provisioner.stranded() + recruits
        commands += self._provisioner.provide(at, needy, self.goal.means)
        if not needy and not self._fleet.loading() and self.goal.means is not self._means:
            self.goal = replace(self.goal, means=self._means)
        if signs == (0, 0) and not commands and not needy and not self._fleet.count(Phase.DRAINING):
            self._settled = state
        return commands

    def _missing(self, role: Role) -> int:
        """How many more of them the goal wants; negative: fewer."""
        wanted = self.goal.decode if role is Role.DECODE else self.goal.prefill
        return wanted - self._fleet.counted(role)

    def _give_up_hopeless(self, at: float) -> list[Command]:
        """Releases stranded instances whose transfers failed too often, and asks for fewer instances."""
        commands: list[Command] = []
        for member in self._provisioner.stranded():
            if member.failures >= MAX_FAILURES:
                if member.role is Role.DECODE:
                    self.goal = replace(self.goal, decode=max(1, self.goal.decode - 1))
                else:
                    self.goal = replace(self.goal, prefill=max(1, self.goal.prefill - 1))
                member.failures, member.barred_until = 0, at + RETRY_S
                commands += self._abandon(member, f"{member.id} could not load the model")
        return commands

    def _abandon(self, member: Member, why: str) -> list[Command]:
        """A loading instance stops: its requests run elsewhere (Release makes it forget them)."""
        commands = self._provisioner.unpair(member.id, lost=False)
        for entry in [*self._book.owned(member.id), *self._book.given(member.id)]:
            commands += self._book.lose(entry, why)
        return commands + [self._release(member)]

    def _revive(self, role: Role, count: int) -> None:
        """Instances that still drain hold every unit: nothing is faster than keeping them, whatever they did before."""
        draining = [m for m in self._fleet.in_phase(Phase.DRAINING) if not m.releasing]
        for member in sorted(draining, key=lambda m: (m.role is not role, m.id))[: max(0, count)]:
            member.move(Phase.SERVING)
            if member.role is not role:
                member.assume(role)

    def _mutate(self) -> None:
        """Prefill instances with the fewest pages become decode instances; one stays."""
        able = [m for m in self._fleet.serving(Role.PREFILL) if self._provisioner.pairs.of(m.id) is None]
        spare = min(self._missing(Role.DECODE), len(self._fleet.serving(Role.PREFILL)) - 1)
        for member in sorted(able, key=lambda m: (self._book.pages(m.id), m.id))[: max(0, spare)]:
            member.assume(Role.DECODE)

    def _reuse_decode(self) -> None:
        """Decode instances without requests run prompts from now on; one stays."""
        serving = self._fleet.serving(Role.DECODE)
        idle = [m for m in serving if not self._book.owns(m.id) and not self._receiving(m.id)]
        count = min(self._missing(Role.PREFILL), -self._missing(Role.DECODE), len(serving) - 1)
        for member in idle[: max(0, count)]:
            member.assume(Role.PREFILL)

    def _drain(self, role: Role) -> list[Command]:
        """Too many of them: broken transfers are not repeated, then those with the fewest requests take nothing new."""
        commands: list[Command] = []
        for member in self._provisioner.stranded():
            idle = member.phase is Phase.LOADING and member.role is role and not self._book.owns(member.id)
            if idle and self._missing(role) < 0 and self._fleet.count(Phase.SERVING):
                commands += self._abandon(member, "scaled down")
        while self._missing(role) < 0:
            serving = self._fleet.serving(role)
            able = [m for m in serving
                    if self._provisioner.pairs.of(m.id) is None and not self._provisioner.transfers.busy(m.id)]
            if len(serving) <= 1 or not able:
                break
            min(able, key=lambda m: self._book.owns(m.id)).move(Phase.DRAINING)
        return commands

    def _release_drained(self) -> list[Command]:
        if not self._fleet.count(Phase.DRAINING):
            return []
        return [self._release(m) for m in self._fleet.in_phase(Phase.DRAINING)
                if not m.releasing and not self._book.owns(m.id) and not self._receiving(m.id)]

    def _release(self, member: Member) -> Command:
        member.release()
        return Release(member.id)

    def _recruits(self, at: float) -> list[Member]:
        """As many IDLE instances as are missing: in the world first, then those that hold most. Decode goes first."""
        decode, prefill = max(0, self._missing(Role.DECODE)), max(0, self._missing(self._prefill))
        if not decode + prefill:
            return []
        idle = [m for m in self._fleet.in_phase(Phase.IDLE) if at >= m.barred_until]
        idle.sort(key=lambda m: (not m.in_world, -m.units, m.id))
        chosen = idle[: decode + prefill]
        for k, member in enumerate(chosen):
            member.assume(Role.DECODE if k < decode else self._prefill)
        return chosen


def _sign(count: int) -> int:
    return (count > 0) - (count < 0)

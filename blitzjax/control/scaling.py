"""How many instances should serve, and which ones come or go to get there?

`reconcile` compares the goal with the fleet after every event and takes the next steps, so nothing that was lost, late
or repeated needs a case of its own. Invariant: the last serving instance only drains when the goal is none, or when
another model has requests and no instance: at once if nobody asks for this one, else after a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from blitzjax.config import Config
from blitzjax.control import autoscale
from blitzjax.control.executor import MATRIX, Action
from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.hostcache import HostCache
from blitzjax.control.load import Load
from blitzjax.control.pace import Pace
from blitzjax.control.provision import Means, Provisioner
from blitzjax.control.requests import RequestBook
from blitzjax.control.sharing import Want
from blitzjax.commands import Command, Release
from blitzjax.events import ScaleRequested
from blitzjax.types import InstanceId, Phase, Role

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
    """Owns the goal of one model; changes phases and roles to approach it. `receiving(i)`: KV is on its way to i.

    `closing`: the model is to go, once the requests that it has have ended.
    """

    def __init__(self, config: Config, fleet: Fleet, book: RequestBook, provisioner: Provisioner, copies: HostCache,
                 receiving: Callable[[InstanceId], bool], pace: Pace) -> None:
        self._config = config
        self._fleet = fleet
        self._book = book
        self._provisioner = provisioner
        self._copies = copies
        self.closing = False
        self._receiving = receiving
        self._pace = pace
        self._means = Means(config.scale.live, config.scale.source)
        self._memory = self._decode_memory = autoscale.Memory()
        self._split = config.scale.roles == "split"
        self._prefill = Role.PREFILL if self._split else Role.MIXED  # the role of instances that run prompts
        self._settled: tuple[int, int, Goal] | None = None  # versions at which there was nothing left to do
        self.goal = Goal(config.scale.min_instances, config.scale.min_decode if self._split else 0, self._means)

    # ---- what is wanted

    def request(self, event: ScaleRequested) -> None:
        """An operator's wish, at most all instances; it stands for `down_after_s` whatever the load is.

        None only if min_instances allows it. With split roles it is about all instances; those that decode stay as
        many as they are, if that leaves one.
        """
        pool = max(len(self._fleet.members), self._config.cluster.pool)
        means = Means(event.live or self._means.live, event.source or self._means.source)
        target = max(1 + self._split if self._config.scale.min_instances else 0, min(event.target, pool))
        decode = max(0, min(self.goal.decode, target - 1))
        self.goal = Goal(target - decode, decode, means, event.at + self._config.scale.down_after_s)
        self._memory = self._decode_memory = autoscale.Memory()
        for member in self._fleet.members.values():
            member.barred_until.pop(self._fleet.model, None)
            if member.model == self._fleet.model:
                member.failures = 0

    @property
    def settled(self) -> bool:
        """There is nothing to do, and was nothing the last time."""
        return self._state() == self._settled and not self.closing and not (self.asleep and self._book.queued)

    def _state(self) -> tuple[int, int, Goal]:
        """What the next steps hang on, apart from time."""
        return self._fleet.version, self._provisioner.transfers.version, self.goal

    @property
    def missing(self) -> int:
        """How many more instances are wanted, of whatever role."""
        return max(0, self._missing(self._prefill)) + max(0, self._missing(Role.DECODE))

    @property
    def surplus(self) -> bool:
        """There are more instances than wanted."""
        return self._instances > self.goal.target

    @property
    def asleep(self) -> bool:
        """No instance is wanted: a request must wake the model."""
        return not self.goal.target

    def wake(self) -> None:
        """A request waits for a model that has no instance, and wants none: it wants one, whatever the policy."""
        if self.asleep and self._book.queued:
            self.goal = replace(self.goal, prefill=1, decode=int(self._split))

    def close(self) -> None:
        """The model is to go: it keeps one instance, of each role, as long as it has requests."""
        self.closing = True
        needed = int(self._book.queued + self._book.running > 0)
        self.goal = Goal(needed, needed * self._split, self._means)

    def tick(self, at: float) -> None:
        """Lets the policy look at the load."""
        if self.closing:
            self.close()
            return
        if self._config.scale.policy != "auto" or at < self.goal.held_until or not self._fleet.members:
            return
        load, scale, decode = self.load(at), self._config.scale, 0
        if not scale.prefill_tokens_per_s:
            scale = replace(scale, prefill_tokens_per_s=self._pace.tokens_per_s)
        if self._split:
            (prefill, self._memory), (decode, self._decode_memory) = autoscale.step_split(
                load, self._memory, self._decode_memory, scale)
        else:
            prefill, self._memory = autoscale.step(load, self._memory, scale)
        if (prefill, decode) != (self.goal.prefill, self.goal.decode):
            self.goal = Goal(prefill, decode, self._means)

    def load(self, at: float) -> Load:
        held = sum(self._book.pages(m.id) * m.page_size for m in self._fleet.serving(Role.PREFILL))  # mixed: none
        return Load(at, self._fleet.counted(self._prefill), self._book.total_backlog_tokens, self._book.total_pages,
                    self._fleet.roster.pages, self._fleet.counted(Role.DECODE), held)

    def want(self, at: float, idle: list[Member]) -> Want:
        """This model's side when workers are short; `idle` ones there are."""
        return Want(self._fleet.model, self._instances, self.missing, len(self._able(at, idle)),
                    min(self._least, self.goal.target), self._book.total_backlog_tokens,
                    None if self._instances else self._waited_s(at))

    @property
    def _instances(self) -> int:
        return self._fleet.counted(self._prefill) + self._fleet.counted(Role.DECODE)

    @property
    def _least(self) -> int:
        scale = self._config.scale
        return max(scale.min_instances + scale.min_decode * self._split, (1 + self._split) * (self._book.queued > 0))

    def _waited_s(self, at: float) -> float | None:
        head = self._book.head()
        return None if head is None else at - head.request.arrival_s

    def spare(self, at: float, model: str, waited_s: float | None) -> list[Member]:
        """Instances that could drain for another model, which can use them, without falling below what this one must have.

        The operator's goal is not to be taken from, nor the last that serves in its role while there are requests. If
        another model waits for its first instance, though, no minimum stands in its way, and after a while only
        requests that have waited as long.
        """
        scale, asked = self._config.scale, self._book.queued + self._book.running > 0
        if waited_s is not None and waited_s >= scale.yield_after_s:
            asked = asked and waited_s <= (self._waited_s(at) or 0.0)
        floor = max(self._least, (1 + self._split) * asked) if asked or waited_s is None else 0
        if self._instances <= (floor if scale.policy == "auto" else max(floor, self.goal.target)):
            return []
        last = {members[0].id for role in Role if asked and len(members := self._fleet.serving(role)) == 1}
        return [m for m in self._drainable() if m.id not in last and usable(m, at, model)]

    def give_up(self, spare: list[Member], wished: InstanceId | None) -> None:
        """Another model needs one of `spare`: `wished` if possible, else the one with the fewest requests."""
        member = min(spare, key=lambda m: (m.id != wished, self._book.owns(m.id)))
        member.move(Phase.DRAINING)
        member.yielded = True

    def place(self, member: Member) -> None:
        """Gives an instance that joined its role: what is missing, prefill first."""
        missing = self._missing(self._prefill), self._missing(Role.DECODE)
        decodes = member.phase is Phase.SERVING and missing[1] > 0 and missing[0] <= 0
        member.assume(Role.DECODE if decodes else self._prefill)

    # ---- getting there

    def waits_for(self, instance: InstanceId) -> bool:
        """Whether the next step may wait for the end of a request of `instance`; the next tick would find it too."""
        member = self._fleet.members.get(instance)
        return self._split or (member is not None and member.phase is Phase.DRAINING)

    def reconcile(self, at: float, idle: list[Member], quota: int) -> list[Command]:
        """The next steps towards the goal. Repeating it without a new event does nothing.

        Of the `idle` workers it takes at most `quota`, which leave the list.
        """
        state = self._state()
        if state == self._settled:
            return []
        commands = self._give_up_hopeless(at)
        if not self._fleet.count(Phase.SERVING) and not self.asleep:
            self._revive(self._prefill, 1)
        self._provisioner.go_on_alone()
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
                    recruits = self._recruits(at, idle, quota)
                case Action.DRAIN_PREFILL:
                    commands += self._drain(self._prefill)
                case Action.DRAIN_DECODE:
                    commands += self._drain(Role.DECODE)
                case _:
                    assert_never(action)
        commands += self._release_drained(at)
        needy = self._provisioner.left_over(at) + recruits
        commands += self._provisioner.provide(at, needy, self.goal.means)
        there = not needy and not self.missing and not self._fleet.loading()
        if there and self.goal.means is not self._means:  # they were about this goal
            self.goal = replace(self.goal, means=self._means)
        pending = needy or self._provisioner.waiting() or self._fleet.count(Phase.DRAINING)
        if signs == (0, 0) and not commands and not pending:
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
                    self.goal = replace(self.goal, decode=_fewer(self.goal.decode))
                else:
                    self.goal = replace(self.goal, prefill=_fewer(self.goal.prefill))
                member.failures, member.barred_until[self._fleet.model] = 0, at + RETRY_S
                commands += self._abandon(member, f"{member.id} could not load the model; the controller's log says why")
        return commands

    def _abandon(self, member: Member, why: str) -> list[Command]:
        """A loading instance stops: its requests run elsewhere (Release makes it forget them)."""
        commands = self._provisioner.unpair(member.id, lost=False)
        for entry in [*self._book.owned(member.id), *self._book.given(member.id)]:
            commands += self._book.lose(entry, why)
        return commands + [self._release(member)]

    def _revive(self, role: Role, count: int) -> None:
        """Instances that still drain hold every unit: nothing is faster than keeping them, whatever they did before."""
        draining = [m for m in self._fleet.in_phase(Phase.DRAINING) if not m.releasing and not m.yielded]
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
        """Decode instances without requests run prompts from now on; one stays. Where nobody runs prompts, nor will, one
        does in any case, and decodes what it has besides.
        """
        serving = self._fleet.serving(Role.DECODE)
        able = sorted((m for m in serving if not self._receiving(m.id)), key=lambda m: self._book.owns(m.id))
        if self._fleet.counted(Role.PREFILL):
            able = [m for m in able if not self._book.owns(m.id)]
            able = able[: max(0, min(self._missing(Role.PREFILL), -self._missing(Role.DECODE), len(serving) - 1))]
        else:
            able = able[:1]
        for member in able:
            member.assume(Role.PREFILL)

    def _drain(self, role: Role) -> list[Command]:
        """Too many of them: broken transfers are not repeated, then those with the fewest requests take nothing new."""
        commands: list[Command] = []
        for member in self._provisioner.stranded():
            paired = self._provisioner.pairs.of(member.id) is not None
            idle = not paired and member.role is role and not self._book.owns(member.id)
            if idle and self._missing(role) < 0 and (self._fleet.count(Phase.SERVING) or self.asleep):
                commands += self._abandon(member, "scaled down")
        while self._missing(role) < 0:
            able = [m for m in self._drainable() if m.role is role]
            if len(self._fleet.serving(role)) <= (not self.asleep) or not able:
                break
            min(able, key=lambda m: self._book.owns(m.id)).move(Phase.DRAINING)
        return commands

    def _drainable(self) -> list[Member]:
        """SERVING instances that nobody executes with or loads from."""
        return [m for m in self._fleet.in_phase(Phase.SERVING)
                if self._provisioner.pairs.of(m.id) is None and not self._provisioner.transfers.busy(m.id)]

    def _release_drained(self, at: float) -> list[Command]:
        """Drained instances forget their parameters; the last one becomes the host copy, or waits for one."""
        commands: list[Command] = []
        if not self._fleet.count(Phase.DRAINING):
            return commands
        for member in self._fleet.in_phase(Phase.DRAINING):
            if member.releasing or self._book.owns(member.id) or self._receiving(member.id):
                continue
            if self._provisioner.transfers.busy(member.id):
                continue  # it is what a host copy is made of
            keep: bool | None = False
            if self._is_last(member) and not self.closing:
                keep, copying = self._copies.retire(at, self._fleet, member)
                commands += copying
            if keep is not None:
                commands.append(self._release(member, keep))
        return commands

    def _is_last(self, member: Member) -> bool:
        """No other instance holds every unit, or will go on to."""
        return not self._fleet.count(Phase.SERVING) and all(
            m is member or m.releasing for m in self._fleet.in_phase(Phase.DRAINING))

    def _release(self, member: Member, keep: bool = False) -> Command:
        member.release()
        return Release(member.id, keep)

    def _recruits(self, at: float, idle: list[Member], quota: int) -> list[Member]:
        """As many IDLE instances as are missing: who keeps the host copy, then those in the world, then those that hold
        most; those that keep copies of other models go last. Decode goes first, behind one that runs prompts.
        """
        if not self.missing or not idle:
            return []
        decode = max(0, self._missing(Role.DECODE))
        model = self._fleet.model
        keeper = self._copies.where(model)
        able = self._able(at, idle)
        able.sort(key=lambda m: (m.id != keeper, not m.in_world, -m.units if m.model == model else 0,
                                 self._copies.count(m.id), m.id))
        chosen = able[: min(self.missing, quota)]
        first = int(self._fleet.counted(self._prefill) == 0)
        for k, member in enumerate(chosen):
            member.assume(Role.DECODE if first <= k < first + decode else self._prefill)
            idle.remove(member)
        return chosen

    def _able(self, at: float, idle: list[Member]) -> list[Member]:
        return [m for m in idle if usable(m, at, self._fleet.model) and not self._provisioner.transfers.settling(m.id)]


def usable(member: Member, at: float, model: str) -> bool:
    """Whether it can be recruited for `model`, for all that it knows."""
    return model in member.ready and at >= member.barred_until.get(model, at)


def _fewer(wanted: int) -> int:
    """One less, but the last one that is wanted."""
    return max(min(wanted, 1), wanted - 1)


def _sign(count: int) -> int:
    return (count > 0) - (count < 0)

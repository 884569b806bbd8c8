"""What is done, and in which order, when prefill and decode instances are short (+1), right (0) or too many (-1)?

BlitzScale's executor matrix (section 7.2 of our notes) as a table. Mixed instances use the rows in which decode is
right.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Action(enum.Enum):
    REVIVE_PREFILL = "draining instances run prompts again"
    REVIVE_DECODE = "draining instances decode again"
    MUTATE = "prefill instances become decode instances in place, with their KV; what prefill lacks then is recruited"
    REUSE_DECODE = "decode instances that have nothing run prompts, or any of them where else nobody would"
    RECRUIT = "idle instances load the model"
    DRAIN_PREFILL = "prefill instances take nothing new"
    DRAIN_DECODE = "decode instances take nothing new"


A = Action
MATRIX: Mapping[tuple[int, int], tuple[Action, ...]] = MappingProxyType({
    # prefill, decode
    (+1, +1): (A.REVIVE_DECODE, A.REVIVE_PREFILL, A.REUSE_DECODE, A.RECRUIT),
    (+1, 0): (A.REVIVE_PREFILL, A.REUSE_DECODE, A.RECRUIT),
    (0, +1): (A.REVIVE_DECODE, A.MUTATE, A.RECRUIT),
    (+1, -1): (A.REVIVE_PREFILL, A.REUSE_DECODE, A.RECRUIT, A.DRAIN_DECODE),
    (-1, +1): (A.REVIVE_DECODE, A.MUTATE, A.RECRUIT),
    (0, 0): (),
    (0, -1): (A.DRAIN_DECODE,),
    (-1, 0): (A.DRAIN_PREFILL,),
    (-1, -1): (A.DRAIN_PREFILL, A.DRAIN_DECODE),
})

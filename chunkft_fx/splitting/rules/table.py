"""Holds the table of rules: for each operator, what its result is to those of the parts.

A rule is a function ``rule(pair) -> relation``. It is asked where an operand depends on the batch, and where a number
of the call that it named does. What it gives must follow from its operands' relations for all values that they can
have; where it does not follow, it raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chunkft_fx.splitting.pair import Pair
from chunkft_fx.splitting.relations import Relation

Function = Callable[[Pair], Relation]


@dataclass(frozen=True)
class Rule:
    """A rule, and the numbers of a call that may differ between the whole and a part because the rule looks at them."""

    function: Function
    differ: frozenset[str]


RULES: dict[Any, Rule] = {}


def rule(*targets: Any, differ: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Enter a rule for these operators; ``differ`` names arguments that it compares itself."""

    def enter(function: Function) -> Function:
        for target in targets:
            assert target not in RULES, target
            RULES[target] = Rule(function, frozenset(differ))
        return function

    return enter

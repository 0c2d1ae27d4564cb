"""Decides what operators do to a batch that is split: the rules of proofs, one file a family of operators.

Importing this package imports every file in it, and each file enters its rules into the table.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from chunkft_fx.splitting.rules.elementwise import elementwise_rule
from chunkft_fx.splitting.rules.table import RULES, Rule

__all__ = ["rule_for"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def rule_for(target: Any) -> Rule | None:
    """The rule of an operator, or None: its entry in the table, else the one rule of all elementwise operators."""
    return RULES.get(target) or elementwise_rule(target)

"""Rules: how mapped clients are put together, one file a rule; the robust ones are in one."""

from __future__ import annotations

from flwr_fusion.errors import check_option
from flwr_fusion.rules.least_squares import LeastSquares
from flwr_fusion.rules.mean import Mean
from flwr_fusion.rules.robust import Krum, TrimmedMean
from flwr_fusion.rules.rule import Combined, Rule, check_rule

__all__ = ["RULES", "Combined", "Krum", "LeastSquares", "Mean", "Rule", "TrimmedMean", "rule_of"]

RULES: dict[str, Rule] = {
    "auto": LeastSquares(moments="auto"),
    "mean": Mean(),
    "least-squares": LeastSquares(),
    "median": TrimmedMean(share=0.5),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
}
"""The rules that have names, with their defaults."""


def rule_of(combine: str | Rule) -> Rule:
    """Return the rule that an argument names or is; refuse anything else."""
    if not isinstance(combine, str):
        return check_rule(combine)
    check_option("combine", combine, tuple(RULES))
    return RULES[combine]

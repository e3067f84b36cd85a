"""Is a token worse than gold? A sequential test on rollouts of both, which asks for no more of them than it needs.

Knows forks, tallies of right answers and the rule that makes verdicts of them. Where rollouts come from, and what a
right answer is, is the business of others.

The test. A token's quality is the share of its continuations that end in the right answer. With the Jeffreys prior
Beta(1/2, 1/2) its posterior after h right ones of n is Beta(1/2 + h, 1/2 + n - h), and

    P = P(gold's quality - the token's quality > quality_margin | all rollouts of both)

is looked at after every few rollouts: the token is a negative from P >= confidence, as good as gold from
P <= futility, and undecided, which is dropped, where neither is reached by the cap. A posterior difference of two
shares, two thresholds, looked at continually: Thall and Simon, "Practical Bayesian guidelines for phase IIB clinical
trials", Biometrics 50 (1994), 337-349. A posterior does not change with how often it is looked at: where the prior
holds, at most 1 - confidence of the negatives, and at most `futility` of the tokens called as good, are mislabelled.
It is chosen over Wald's SPRT, which wants two fixed qualities to tell apart where here both are unknown, and over
racing with Hoeffding's bound (Maron and Moore, 1994), which at 16 rollouts is still 0.3 wide on either side. The
Jeffreys prior has most of its mass near 0 and 1, and so have qualities: from most prefixes a model nearly always or
nearly never gets there.

Most tokens are as good as gold, so futility decides the cost. Gold goes first: where it never gets there, no token can
be worse, and none is rolled out at all. Its rollouts are shared by all tokens of the fork, and one that follows the
gold solution to a later fork is a rollout of the token it takes there too (System 1's own continuation of that prefix),
so that the first fork's rollouts pay for much of what follows. The price: errors about gold, where they happen, happen
at neighbouring forks together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import betainc

from llm2.config import StoppingRule

JEFFREYS = 0.5
CELLS = 400  # of the integral over gold's quality

Verdict = Literal["negative", "equal", "undecided"]


@dataclass(frozen=True)
class Fork:
    """A position of a gold solution where System 1 has more than one plausible token."""

    position: int
    tokens: tuple[int, ...]  # gold first, then System 1's other plausible tokens, best first
    probabilities: tuple[float, ...]  # System 1's, of these tokens


class RolloutCounts(NamedTuple):
    """Rollouts of a token, and how many of them ended in the right answer."""

    right: int = 0
    rollouts: int = 0

    @property
    def quality(self) -> float:
        return self.right / self.rollouts if self.rollouts else float("nan")


@cache
def probability_worse(token: RolloutCounts, gold: RolloutCounts, margin: float) -> float:
    """P(gold's quality - the token's > margin).

    The integral over gold's quality of its posterior times the token's distribution function `margin` below: cell by
    cell, with the cell's exact mass and the distribution function at its middle.
    """
    edges = np.linspace(0, 1, CELLS + 1)
    mass = np.diff(betainc(JEFFREYS + gold.right, JEFFREYS + gold.rollouts - gold.right, edges))
    below = np.clip((edges[:-1] + edges[1:]) / 2 - margin, 0, 1)
    return float(mass @ betainc(JEFFREYS + token.right, JEFFREYS + token.rollouts - token.right, below))


class SequentialTest:
    """The tests of all tokens of one solution's forks, and the rollouts that they share."""

    def __init__(self, forks: Sequence[Fork], rule: StoppingRule) -> None:
        self.forks, self.rule = forks, rule
        self.tallies = {(fork.position, token): RolloutCounts() for fork in forks for token in fork.tokens}
        self.asked = dict.fromkeys(
            self.tallies, 0
        )  # rollouts begun at that token; those that pass by are not asked for
        self.verdicts: dict[tuple[int, int], Verdict] = {}  # of the tokens that are not gold, once there is one

    def add(self, position: int, token: int, right: bool, rollouts: int = 1) -> None:
        """Count rollouts of one outcome that begin at this token or pass through it."""
        tally = self.tallies[position, token]
        self.tallies[position, token] = RolloutCounts(tally.right + right * rollouts, tally.rollouts + rollouts)

    def ask(self) -> dict[tuple[int, int], range]:
        """The rollouts to begin now: (position, token) -> their indices. Empty once every token has its verdict.

        Of the forks whose gold token lacks rollouts only the first one asks for them: they may pass by the others.
        """
        wanted: dict[tuple[int, int], int] = {}
        gold_asked = False
        for fork in self.forks:
            gold, *others = ((fork.position, token) for token in fork.tokens)
            missing = self.rule.gold_rollouts - self.tallies[gold].rollouts
            if missing <= 0:
                wanted |= {other: n for other in others if (n := self._wants(other, self.tallies[gold]))}
            elif not gold_asked:
                wanted[gold], gold_asked = missing, True
        asks = {key: range(self.asked[key], self.asked[key] + n) for key, n in wanted.items()}
        self.asked |= {key: indices.stop for key, indices in asks.items()}
        return asks

    def _wants(self, key: tuple[int, int], gold: RolloutCounts) -> int:
        """Judge the token if that can be done; else how many more rollouts of it that takes."""
        if key in self.verdicts:
            return 0
        rule, token = self.rule, self.tallies[key]
        worse = probability_worse(token, gold, rule.quality_margin)
        if worse <= rule.futility:
            self.verdicts[key] = "equal"
        elif token.rollouts < rule.min_rollouts:
            return rule.min_rollouts - token.rollouts
        elif worse >= rule.confidence:
            self.verdicts[key] = "negative"
        elif token.rollouts >= rule.max_rollouts:
            self.verdicts[key] = "undecided"
        else:
            return min(rule.rollouts_step, rule.max_rollouts - token.rollouts)
        return 0


def reused_rollouts(
    ids: Sequence[int], begun: int, continuation: Sequence[int], forks: Iterable[Fork]
) -> Iterable[tuple[int, int]]:
    """The (position, token) of later forks that a rollout reused_rollouts through while it follows the gold solution.

    Args:
        ids: token ids of the whole conversation.
        begun: position of the gold token at which the rollout began.
        continuation: what was written behind that token.
    """
    for fork in forks:
        ahead = fork.position - begun - 1  # tokens between the two
        if 0 <= ahead < len(continuation):
            if list(continuation[:ahead]) != list(ids[begun + 1 : fork.position]):
                return
            if continuation[ahead] in fork.tokens:
                yield fork.position, continuation[ahead]

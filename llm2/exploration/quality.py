"""Is a token worse than gold? A sequential test on rollouts of both that stops as soon as it can decide.

A token's quality is the share of its continuations that end in the right answer. With the Jeffreys prior
Beta(1/2, 1/2) its posterior after h right ones of n is Beta(1/2 + h, 1/2 + n - h). After every few rollouts

    P = P(gold's quality - the token's quality > quality_margin | all rollouts of both)

decides: the token is a negative from P >= confidence, as good as gold from P <= futility, and undecided, which is
dropped, where max_rollouts bring neither. Two thresholds on the posterior difference of two shares: Thall and Simon,
"Practical Bayesian guidelines for phase IIB clinical trials", Biometrics 50 (1994), 337-349. A posterior does not
depend on how often it is evaluated: where the prior holds, at most 1 - confidence of the negatives, and at most
`futility` of the tokens called equal, are mislabelled. Wald's SPRT would need two fixed qualities to tell apart, and
both are unknown here; Hoeffding's bound (racing: Maron and Moore, 1994) is still 0.3 wide on either side after 16
rollouts. The Jeffreys prior has most of its mass near 0 and 1, as qualities have: from most prefixes a model nearly
always or nearly never succeeds.

Most tokens are as good as gold, so futility decides the cost. Gold goes first: where it never succeeds, no token can be
worse, and none is rolled out. All tokens of a fork share gold's rollouts, and a rollout that follows the gold solution
to a later fork also counts for the token it takes there (it is System 1's continuation of that prefix), so the
first fork's rollouts serve many later forks. The cost: errors about gold are correlated between neighbouring forks.

A model that solves a problem by luck has most of its forks where gold has hardly a chance yet, and rollouts are longest
there. With skip_hopeless a fork is given up after the few wrong rollouts of gold that show that no token can be clearly
worse, and bisection finds the first fork that is not hopeless. The forks before it, mostly not looked at, are dropped.
Gold's quality need not rise along the solution: where it falls and rises again, forks are lost, but no label is wrong.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llm2.common.stats import probability_worse
from llm2.config import StoppingRule

Verdict = Literal["negative", "equal", "undecided"]


@dataclass(frozen=True)
class Fork:
    """A position of a gold solution where System 1 has more than one plausible token."""

    position: int
    tokens: tuple[int, ...]  # gold first, then System 1's other plausible tokens, likeliest first
    probabilities: tuple[float, ...]  # System 1's, of these tokens


class RolloutCounts(NamedTuple):
    """Rollouts of a token, and how many of them ended in the right answer."""

    right: int = 0
    rollouts: int = 0

    @property
    def quality(self) -> float:
        return self.right / self.rollouts if self.rollouts else float("nan")


class SequentialTest:
    """Tests of all tokens at one solution's forks, by (position, token); gold tokens have counts but no verdict."""

    def __init__(self, forks: Sequence[Fork], rule: StoppingRule) -> None:
        self.forks, self.rule = forks, rule
        self.counts = {(fork.position, token): RolloutCounts() for fork in forks for token in fork.tokens}
        self.requested = dict.fromkeys(self.counts, 0)  # rollouts that begin at the token, without reused ones
        self.verdicts: dict[tuple[int, int], Verdict] = {}
        self.skipped_forks: int | None = None if rule.skip_hopeless else 0  # the first ones; None until known
        wrong = range(1, rule.gold_rollouts)
        self.few = next((n for n in wrong if self._is_hopeless(RolloutCounts(0, n))), rule.gold_rollouts)

    @property
    def progress(self) -> float:
        """The share of the tokens that have a verdict; a gold token counts by its share of gold_rollouts."""
        done = float(len(self.verdicts))
        for fork in self.forks:
            gold, *others = ((fork.position, token) for token in fork.tokens)
            share = min(1, self.counts[gold].rollouts / self.rule.gold_rollouts)
            done += 1 if all(other in self.verdicts for other in others) else share
        return done / len(self.counts) if self.counts else 1.0

    def add(self, position: int, token: int, right: bool, rollouts: int = 1) -> None:
        """Count rollouts with equal outcomes that begin at this token or pass through it."""
        counts = self.counts[position, token]
        self.counts[position, token] = RolloutCounts(counts.right + right * rollouts, counts.rollouts + rollouts)

    def next_rollouts(self) -> dict[tuple[int, int], range]:
        """The rollouts to start now: (position, token) -> their indices. Empty when every token has a verdict.

        Gold rollouts are started only at the first fork that lacks some, since they may pass through later forks.
        """
        missing: dict[tuple[int, int], int] = {}
        gold_begins = False
        probe = self._probe() if self.skipped_forks is None else None
        for fork in self.forks if probe is None else [probe]:
            gold, *others = ((fork.position, token) for token in fork.tokens)
            gold_missing = self._gold_missing(self.counts[gold])
            if gold_missing <= 0:
                missing |= {other: n for other in others if (n := self._judge(other, self.counts[gold]))}
            elif not gold_begins:
                missing[gold], gold_begins = gold_missing, True
        indices = {key: range(self.requested[key], self.requested[key] + n) for key, n in missing.items()}
        self.requested |= {key: new.stop for key, new in indices.items()}
        return indices

    def _is_hopeless(self, gold: RolloutCounts) -> bool:
        """Whether no other token of a fork can be clearly worse, whatever its own rollouts."""
        if not self.rule.skip_hopeless or not gold.rollouts:
            return False
        return probability_worse(RolloutCounts(), gold, self.rule.quality_margin) <= self.rule.futility

    def _gold_missing(self, gold: RolloutCounts) -> int:
        """Rollouts of a gold token to add: none where it is hopeless, which the first `few` may show."""
        if gold.rollouts < self.few:
            return self.few - gold.rollouts
        return 0 if self._is_hopeless(gold) else self.rule.gold_rollouts - gold.rollouts

    def _probe(self) -> Fork | None:
        """The fork whose gold token to look at next, by bisection; None once the first that is not hopeless is known,
        with the forks before it dropped."""
        hopeless, hopeful, index = -1, len(self.forks), 0
        while hopeful - hopeless > 1:
            gold = self.counts[self.forks[index].position, self.forks[index].tokens[0]]
            if gold.rollouts < self.few:
                return self.forks[index]
            hopeless, hopeful = (index, hopeful) if self._is_hopeless(gold) else (hopeless, index)
            index = (hopeless + hopeful) // 2
        self.skipped_forks, self.forks = hopeful, self.forks[hopeful:]
        kept = {(fork.position, token) for fork in self.forks for token in fork.tokens}
        self.counts = {key: counts for key, counts in self.counts.items() if key in kept}
        return None

    def _judge(self, key: tuple[int, int], gold: RolloutCounts) -> int:
        """Set the token's verdict and return 0 if its rollouts suffice; otherwise return how many to add."""
        if key in self.verdicts:
            return 0
        rule, token = self.rule, self.counts[key]
        worse = probability_worse(token, gold, rule.quality_margin)
        if worse <= rule.futility or self._is_hopeless(gold):
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
    ids: Sequence[int], position: int, continuation: Sequence[int], forks: Sequence[Fork]
) -> Iterator[tuple[int, int]]:
    """The (position, token) of later forks for which a rollout also counts, since it follows the gold solution to them.

    The rollout is the gold token at `position` and its continuation; `ids` are the whole conversation's.
    """
    for fork in forks:
        between = fork.position - position - 1  # tokens between the two positions
        if 0 <= between < len(continuation):
            if list(continuation[:between]) != list(ids[position + 1 : fork.position]):
                return
            if continuation[between] in fork.tokens:
                yield fork.position, continuation[between]

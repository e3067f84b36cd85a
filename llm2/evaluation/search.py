"""Best-first search over the plausible tokens, and a vote over the answers that it finds.

A solution has the probability of its tokens, each under softmax(logits + beta * score) of its step's plausible set.
Greedy decoding takes one path; every candidate that it passes by begins a branch with the probability of its own path
so far. The search of a problem decodes its most probable open branch greedily, which opens further branches, and so on.
A solution votes for its answer with its probability. The search ends at `max_solutions`, or once the open branches
weigh less than the leading answer is ahead: none of them can overturn the vote. A sure problem costs one solution.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, nsmallest
from itertools import count
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from llm2.decoding.decoder import Decoder
from llm2.decoding.processing import logits_fn
from llm2.decoding.sampling import Completion, Guidance, TokenTrace
from llm2.decoding.system2 import Candidates, Handle, System2

AnswerFn = Callable[[int, Sequence[int]], str | None]


class NoScores(System2):
    """Scores of zero: candidates without System 2, for the search of System 1 alone."""

    needs_tokens = False

    def score(self, handles: Sequence[Handle], candidates: Candidates) -> torch.Tensor:
        return torch.zeros_like(candidates.logits)


def unguided(alpha: float, top_k: int | None) -> Guidance:
    """Guidance of the search of System 1 alone."""
    return Guidance(verifier=NoScores(), alpha=alpha, beta=0.0, top_k=top_k)


class Branch(NamedTuple):
    """The beginning of a solution; sorts by its probability, then by age."""

    cost: float  # minus its log-probability
    number: int
    tokens: list[int]
    trace: list[TokenTrace]


class Found(NamedTuple):
    """What the search of a problem found.

    Attributes:
        completion: the most probable solution with the winning answer; its counts are those of the whole search.
        num_tokens: generated in the search.
        num_solutions: decoded.
        vote: the winning answer's share of the votes; 0 where no solution has an answer.
    """

    completion: Completion
    num_tokens: int
    num_solutions: int
    vote: float


class Search:
    """The search of one problem."""

    def __init__(self, beta: float, answer: Callable[[Sequence[int]], str | None], max_solutions: int) -> None:
        self.beta, self.answer, self.max_solutions = beta, answer, max_solutions
        self.numbers = count()
        self.open = [Branch(0.0, next(self.numbers), [], [])]  # a heap
        self.solutions: list[tuple[Branch, str | None]] = []  # whole, with its answer
        self.votes: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()  # calls, read, tokens

    def pop(self) -> Branch | None:
        """The branch to decode next; None when the search is over."""
        if not self.open or len(self.solutions) == self.max_solutions or self._is_decided():
            return None
        return heappop(self.open)

    def _is_decided(self) -> bool:
        lead, second, *_ = [*sorted(self.votes.values(), reverse=True), 0.0, 0.0]
        still_open = 1.0 - sum(math.exp(-whole.cost) for whole, _ in self.solutions)
        return lead - second > max(still_open, 0.0)

    def add(self, branch: Branch, completion: Completion) -> None:
        """The branch goes on with this completion: count the solution, and open the branches that it passes by. Of all
        open ones as many are kept as may still be decoded."""
        tokens, trace, cost = branch.tokens + completion.token_ids, branch.trace + completion.trace, branch.cost
        for at in range(len(branch.tokens), len(tokens)):
            token, logprobs = trace[at], self.logprobs(trace[at])
            for choice, candidate in enumerate(token.candidates):
                if choice != token.chosen:
                    taken = token._replace(chosen=choice, changed=choice > 0)
                    beginning = [*tokens[:at], candidate], [*trace[:at], taken]
                    self.open.append(Branch(cost - logprobs[choice], next(self.numbers), *beginning))
            cost -= logprobs[token.chosen]
        answer = self.answer(tokens)
        if answer is not None:
            self.votes[answer] += math.exp(-cost)
        self.solutions.append((Branch(cost, branch.number, tokens, trace), answer))
        self.open = nsmallest(self.max_solutions - len(self.solutions), self.open)  # sorted, so a heap
        new = len(completion.token_ids) + bool(branch.tokens)  # the token that begins a branch is a choice too
        self.counts.update(tokens=new, calls=completion.num_verifier_calls, read=completion.num_verifier_tokens)

    def logprobs(self, token: TokenTrace) -> list[float]:
        """log softmax(logits + beta * score) over a step's candidates."""
        scores = token.scores or [0.0] * len(token.candidates)
        guided = [logprob + self.beta * score for logprob, score in zip(token.logprobs, scores, strict=True)]
        highest = max(guided)
        total = highest + math.log(sum(math.exp(value - highest) for value in guided))
        return [value - total for value in guided]

    def result(self) -> Found:
        winner = max(self.votes, key=self.votes.get) if self.votes else None
        best = min(whole for whole, answer in self.solutions if answer == winner)
        completion = Completion(best.tokens, self.counts["calls"], self.counts["read"], best.trace)
        vote = self.votes[winner] / sum(self.votes.values()) if self.votes else 0.0
        return Found(completion, self.counts["tokens"], len(self.solutions), vote)


def search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    answer: AnswerFn,
    *,
    max_solutions: int,
    max_new_tokens: int,
    eos: Sequence[int],
    names: Sequence[str],
    batch_size: int | str = 64,
    on_token: Callable[[int, int, int], None] | None = None,
    processor: LogitsProcessor | None = None,
) -> Iterator[tuple[int, Found]]:
    """Yield (prompt index, what was found) as searches finish; branches of all prompts are decoded together.

    Args:
        decoder: with guidance; its verifier may be `NoScores`.
        answer: maps a prompt's index and a solution's tokens to the answer that it votes for, None for none.
        max_new_tokens: of a solution, from its first token.
        processor: acts on System 1's logits before the plausible set.

    The other arguments are those of `DecodeRequest`. Raises UserError if a prompt and twice max_new_tokens, a whole
    solution's beginning with room for another, do not fit the model.
    """
    for prompt, name in zip(prompts, names, strict=True):
        decoder.state.refuse_too_long(len(prompt) + max_new_tokens, max_new_tokens, f"the search of problem {name!r}")
    beta = decoder.guidance.beta
    searches = {
        index: Search(beta, lambda tokens, index=index: answer(index, tokens), max_solutions)
        for index in range(len(prompts))
    }
    waiting = deque((index, one.pop()) for index, one in searches.items())
    taken: dict[int, tuple[int, Branch]] = {}  # in flight, by the decoder's index
    numbers = count()

    def further() -> list[tuple[list[int], Sequence[int], str]]:
        new = list(waiting)
        waiting.clear()
        taken.update({next(numbers): entry for entry in new})
        return [([*prompts[index], *branch.tokens], [0], names[index]) for index, branch in new]

    def stop(number: int, _: int, new_tokens: Sequence[int]) -> bool:
        return len(taken[number][1].tokens) + len(new_tokens) >= max_new_tokens

    options = {"max_new_tokens": max_new_tokens, "eos": eos, "batch_size": batch_size, "trace": True}
    if on_token is not None:
        options["on_token"] = lambda number, sample, token: on_token(taken[number][0], sample, token)
    options["process_logits"] = logits_fn(
        processor, lambda number: [*prompts[taken[number][0]], *taken[number][1].tokens]
    )
    for number, (completion,) in decoder.stream([], seeds=[], further=further, stop=stop, **options):
        index, branch = taken.pop(number)
        one = searches[index]
        one.add(branch, completion)
        while (branch := one.pop()) and (branch.tokens[-1] in eos or len(branch.tokens) >= max_new_tokens):
            one.add(branch, Completion([], 0, 0, []))  # complete as it is
        if branch is not None:
            waiting.append((index, branch))
        else:
            yield index, searches.pop(index).result()

"""Search against the whole tree of plausible solutions, written out; its vote, its end, its cost."""

import math
from collections import Counter

import pytest
import torch
from reference import scores
from transformers import GPT2Config, GPT2LMHeadModel

from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Completion, Guidance, TokenTrace
from llm2.errors import UserError
from llm2.evaluation.search import Search, search, unguided

EOS = [1]
LENGTH = 3
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 12]]


def answer(_, tokens) -> str | None:
    """The last token before the end, coarsely, so that solutions share answers; None for one residue."""
    last = [token for token in tokens if token not in EOS][-1:]
    return str(last[0] % 5) if last and last[0] % 5 else None


@torch.inference_mode()
def whole_tree(system1, prompt, scored, alpha, beta):
    """Every solution of up to LENGTH plausible tokens, with its probability."""
    complete, begun = {}, [((), 0.0)]
    while begun:
        tokens, logprob = begun.pop()
        if len(tokens) == LENGTH or tokens[-1:] == tuple(EOS):
            complete[tokens] = logprob
            continue
        logits = system1(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        found = [v for v in range(len(logits)) if logits[v] >= logits.max() + math.log(alpha)]
        guided = logits[found] + beta * torch.tensor(scored([*prompt, *tokens], found))
        for token, value in zip(found, guided.log_softmax(-1).tolist(), strict=True):
            begun.append(((*tokens, token), logprob + value))
    return complete


def run(system1, guidance, prompts=PROMPTS, max_solutions=10_000, batch_size=4, answer=answer):
    names = [str(index) for index in range(len(prompts))]
    options = {"max_new_tokens": LENGTH, "eos": EOS, "names": names, "batch_size": batch_size}
    found = dict(search(Decoder(system1, guidance), prompts, answer, max_solutions=max_solutions, **options))
    return [found[index] for index in range(len(prompts))]


@pytest.fixture(params=["guided", "plain"])
def setting(request, system1, verifier):
    """Guidance, and the whole tree of each prompt."""
    if request.param == "guided":
        guidance = Guidance(verifier=verifier, alpha=0.6, beta=0.5)
        scored = lambda ids, tokens: scores(verifier, ids, tokens)  # noqa: E731
    else:
        guidance, scored = unguided(0.6, None), lambda ids, tokens: [0.0] * len(tokens)
    return guidance, [whole_tree(system1, prompt, scored, guidance.alpha, guidance.beta) for prompt in PROMPTS]


def test_a_search_without_end_finds_every_solution_once_and_the_most_probable_one(system1, setting):
    guidance, trees = setting
    for tree, found in zip(trees, run(system1, guidance, answer=lambda *_: None), strict=True):
        assert sum(map(math.exp, tree.values())) == pytest.approx(1, abs=1e-4)
        assert found.num_solutions == len(tree) and found.vote == 0
        assert tuple(found.completion.token_ids) == max(tree, key=tree.get)


def test_the_answer_is_that_of_the_whole_tree_though_a_search_ends_earlier(system1, setting):
    guidance, trees = setting
    ended = run(system1, guidance)
    for tree, found in zip(trees, ended, strict=True):
        votes = Counter()
        for tokens, logprob in tree.items():
            votes[answer(0, tokens)] += math.exp(logprob)
        del votes[None]
        winner = max(votes, key=votes.get)
        assert answer(0, found.completion.token_ids) == winner
        assert 1 / len(votes) <= found.vote <= 1
    assert len(ended) < sum(found.num_solutions for found in ended) < sum(map(len, trees))


def test_one_solution_is_guided_greedy_decoding(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.3, beta=2.0)
    greedy = Decoder(system1, guidance).decode(PROMPTS, max_new_tokens=LENGTH, eos=EOS)
    for (expected,), found in zip(greedy, run(system1, guidance, max_solutions=1), strict=True):
        assert found.completion.token_ids == expected.token_ids
        assert found.num_tokens == len(expected.token_ids) and found.num_solutions == 1


def test_a_search_depends_on_its_problem_alone(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.3, beta=2.0)
    together = run(system1, guidance, max_solutions=6)
    for batch_size in (1, 3):
        for found, other in zip(together, run(system1, guidance, max_solutions=6, batch_size=batch_size), strict=True):
            assert found.completion.token_ids == other.completion.token_ids
            assert (found.num_tokens, found.num_solutions) == (other.num_tokens, other.num_solutions)
            assert found.vote == pytest.approx(other.vote, abs=1e-5)
    (alone,) = run(system1, guidance, PROMPTS[:1], max_solutions=6)
    assert alone.completion.token_ids == together[0].completion.token_ids


def test_no_solution_is_longer_than_the_limit_and_its_trace_names_its_tokens(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.1, beta=1.0)
    for found in run(system1, guidance, max_solutions=30, answer=lambda *_: None):
        tokens, trace = found.completion.token_ids, found.completion.trace
        assert len(tokens) <= LENGTH and len(trace) == len(tokens)
        assert [step.candidates[step.chosen] for step in trace] == tokens
        assert found.num_solutions == 30 and found.num_tokens <= 30 * LENGTH


def test_a_prompt_without_room_for_a_branch_is_refused_before_decoding():
    config = GPT2Config(vocab_size=64, n_positions=12, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    assert run(model, unguided(0.9, None), [[5] * (12 - 2 * LENGTH)])
    with pytest.raises(UserError, match="the search of problem '0'"):
        run(model, unguided(0.9, None), [[5] * (13 - 2 * LENGTH)])


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_branches_beyond_the_last_solution_are_not_kept(system1, verifier, most):
    """A search of few solutions finds the first ones of a search of many, and keeps no branch that it never decodes."""
    guidance, texts = Guidance(verifier=verifier, alpha=0.3, beta=0.5), {}

    def of(name: int):
        texts[name] = []
        return lambda _, tokens: texts[name].append(tuple(tokens))  # no votes: only `most` ends the search

    run(system1, guidance, PROMPTS[:1], 50, answer=of(50))
    run(system1, guidance, PROMPTS[:1], most, answer=of(most))
    assert len(texts[most]) == most and texts[most] == texts[50][:most]
    one = Search(0.5, lambda tokens: None, most)
    trace = [TokenTrace([*range(100)], [-float(i) for i in range(100)], None, 0, False)] * 3
    one.add(one.pop(), Completion([0, 0, 0], 3, 3, trace))
    assert len(one.open) == most - 1

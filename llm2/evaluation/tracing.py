"""Traces: how each token of a completion was chosen, as JSON for the report."""

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.decoding.candidates import plausible
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.sampling import Completion, Guidance, TokenTrace
from llm2.decoding.system2 import Candidates
from llm2.decoding.system2.kinds import open_system2, runner_of


class TokenText:
    """Token id -> its text within a line, including a leading space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.cache = tokenizer, {}
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # some tokenizers strip a leading space
        self.offset = len(tokenizer.decode(self.anchor))

    def __call__(self, token: int) -> str:
        if token not in self.cache:
            text = self.tokenizer.decode([*self.anchor, token], clean_up_tokenization_spaces=False)
            self.cache[token] = text[self.offset :]
        return self.cache[token]


def trace_record(completion: Completion, scores: Sequence[float] | None, token_text: TokenText) -> dict:
    """The trace of one completion.

    Args:
        scores: the verifier's score of each token, if it scored the completion.

    Returns:
        {"tokens": [text], "scores": [float] or None, "choices": [{"at", "candidates", "logprobs", "scores", "chosen",
        "changed"}]}, with a choice for each token (index `at`) at which System 1 had more than one candidate.
    """
    choices = [
        {
            "at": at,
            "candidates": [token_text(candidate) for candidate in token.candidates],
            "logprobs": [round(value, 3) for value in token.logprobs],
            "scores": [round(value, 3) for value in token.scores],
            "chosen": token.chosen,
            "changed": bool(token.changed),
        }
        for at, token in enumerate(completion.trace or [])
        if token.scores is not None
    ]
    return {
        "tokens": [token_text(token) for token in completion.token_ids],
        "scores": None if scores is None else [round(score, 2) for score in scores],
        "choices": choices,
    }


@torch.inference_mode()
def recompute_trace(
    system1: PreTrainedModel, guidance: Guidance, prompt: Sequence[int], completion: Completion, sampled: bool
) -> Completion:
    """The completion with its trace, for an engine that returns only tokens; one forward of each system.

    For sampled completions `changed` is always False, since the engine's random numbers are unknown.
    """
    new = completion.token_ids
    ids = torch.tensor([[*prompt, *new]], device=system1.device)
    logits = system1(ids, use_cache=False, logits_to_keep=len(new) + 1).logits[0, :-1].float()  # (new, V)
    found, valid = plausible(logits, guidance.alpha, guidance.top_k)
    candidates = Candidates(found, valid, logits.gather(-1, found))
    forks = [at for at, tokens in enumerate(candidates.lists) if len(tokens) > 1][::-1]  # the longest prefix first
    kind, slots = guidance.verifier, range(len(forks))
    system2 = open_system2(kind, runner_of(kind), SlotCache(len(forks)), slots, Counter())
    if system2.needs_states:
        candidates.states = system1.base_model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    handles = [system2.join([*prompt, *new[:at]]) for at in forks]
    rows = system2.score(handles, candidates[forks]).tolist() if forks else []
    scores = {at: row[: len(candidates.lists[at])] for at, row in zip(forks, rows, strict=True)}
    trace = []
    for at, (token, tokens) in enumerate(zip(new, candidates.lists, strict=True)):
        if token not in tokens:  # a near tie that the engine resolved differently
            tokens = [*tokens, token]
            scores.pop(at, None)
        logprobs = logits[at].log_softmax(dim=-1)[tokens].tolist()
        chosen = tokens.index(token)
        changed = chosen > 0 and at in scores and not sampled
        trace.append(TokenTrace(tokens, logprobs, scores.get(at), chosen, changed))
    return completion._replace(trace=trace)

"""The verifier's score of every token of finished solutions, for ranking, weighted votes and the report's colours."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase

from llm2.common.architecture import keeps_contexts
from llm2.common.chat import Message, encode_chats
from llm2.common.prefix import common_prefix
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.steps import as_text, check_steps, step_ends

Reduction = Literal["mean", "min", "last", "product"]
# Ids up to the first score that counts, ids that follow (end of sequence included), and whose scores of these count.
Encoded = tuple[list[int], list[int], Sequence[int]]


def encode_solutions(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    solutions: Sequence[str | Sequence[str]],
    eos: Sequence[int],
    template: str | None = None,
) -> list[Encoded]:
    """Of a text all tokens' scores count, of a list of steps those of their last tokens.

    What a template writes behind the end is not the answer's. Raises UserError where an answer has no token.
    """
    (prompt,) = encode_chats(tokenizer, [messages], template, True)
    chats = [[*messages, {"role": "assistant", "content": as_text(solution)}] for solution in solutions]
    encoded = []
    for index, ids in enumerate(encode_chats(tokenizer, chats, template)):
        start = common_prefix(ids, prompt)
        end = next((i for i in range(start, len(ids)) if ids[i] in eos), len(ids))
        if start == 0 or start == len(ids):
            raise UserError(f"solution {index}: expected a prompt and a text of at least one token, found none")
        counted = range(start, min(end + 1, len(ids)))
        if not isinstance(solutions[index], str):
            steps, where = [*solutions[index]], f"solution {index}"
            check_steps(steps, where, "solutions")
            counted = step_ends(tokenizer, messages, steps, template, where)
        first, last = counted[0], counted[-1]
        encoded.append((ids[:first], ids[first : last + 1], [position - first for position in counted]))
    return encoded


def score_solutions(verifier: ProcessVerifier, solutions: Sequence[Encoded], **options) -> list[list[float]]:
    """The scores that count of each solution; `options` as for `score_tokens`."""
    prompts, answers, counted = zip(*solutions, strict=True) if solutions else ((), (), ())
    rows = score_tokens(verifier, prompts, answers, **options)
    return [[row[index] for index in indices] for row, indices in zip(rows, counted, strict=True)]


@torch.inference_mode()
def score_tokens(
    verifier: ProcessVerifier,
    prompts: Sequence[Sequence[int]],
    solutions: Sequence[Sequence[int]],
    batch_size: int = 16,
    names: Sequence[str] | None = None,
) -> list[list[float]]:
    """Scores of the tokens of each solution.

    Args:
        prompts: token ids, none empty.
        solutions: token ids that follow the prompt of the same index.
        batch_size: sequences of a forward, batched by length; a prompt of several of them is read once.
        names: what an error calls each solution's problem; its index when None.

    Raises UserError where a score is NaN or infinite.
    """
    texts = [torch.tensor([*prompt, *solution]) for prompt, solution in zip(prompts, solutions, strict=True)]
    contexts = [tuple(prompt[:-1]) for prompt in prompts]  # the first score is read with the prompt's last token
    repeated = len({*contexts}) < len(contexts) and min(map(len, contexts)) > 0 and keeps_contexts(verifier.backbone)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    if repeated:  # those of a prompt side by side
        order.sort(key=lambda index: (len(contexts[index]), contexts[index]))
    token_scores: dict[int, list[float]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        shared = repeated and len({contexts[index] for index in batch}) < len(batch)
        read = [len(contexts[index]) if shared else 0 for index in batch]
        rest = [texts[index][first:] for index, first in zip(batch, read, strict=True)]
        scores = _scores(verifier, rest, [contexts[index] for index in batch] if shared else None)
        for index, first, row in zip(batch, read, scores.float().cpu(), strict=True):
            row = row[len(prompts[index]) - first : len(texts[index]) - first]
            if not row.isfinite().all():
                position = int(row.isfinite().logical_not().nonzero()[0])
                raise UserError(
                    f"{f'solution {index}' if names is None else f'problem {names[index]!r}'}, position "
                    f"{len(prompts[index]) + position} (token {position} of the solution): the verifier's score is "
                    f"{row[position].item()}, expected a finite number; try dtype=float32"
                )
            token_scores[index] = row.tolist()
    return [token_scores[index] for index in range(len(texts))]


def _scores(
    verifier: ProcessVerifier, texts: Sequence[torch.Tensor], contexts: Sequence[Sequence[int]] | None
) -> torch.Tensor:
    """Scores (B, S) of all tokens of texts, behind contexts if given, of which equal ones are read once."""
    ids = pad_sequence(texts, batch_first=True)  # (B, S), right-padded
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    options = {}
    if contexts is not None:
        numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
        cache, kept = _read(verifier, [*numbers])
        rows = torch.tensor([numbers[context] for context in contexts])
        cache.batch_select_indices(rows.to(verifier.device))
        positions = kept[rows].sum(1, keepdim=True) + torch.arange(ids.shape[1])
        options = _with_cache(verifier, cache) | {"position_ids": positions.to(verifier.device)}
        mask = torch.cat([kept[rows], mask], dim=1)
    return verifier(ids.to(verifier.device), attention_mask=mask.to(verifier.device), **options).scores


def _read(verifier: ProcessVerifier, contexts: Sequence[Sequence[int]]) -> tuple[DynamicCache, torch.Tensor]:
    """The keys and values of contexts, and (P, C) which of the cache's columns are theirs: they are left-padded."""
    texts = [torch.tensor(context) for context in contexts]
    ids = pad_sequence(texts, batch_first=True, padding_side="left")
    kept = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
    positions = (kept.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=verifier.backbone.config)
    inputs = {"input_ids": ids, "attention_mask": kept, "position_ids": positions}
    inputs = {name: tensor.to(verifier.device) for name, tensor in inputs.items()}
    verifier.backbone(**inputs, **_with_cache(verifier, cache))
    return cache, kept


def _with_cache(verifier: ProcessVerifier, cache: DynamicCache) -> dict[str, Any]:
    named = "cache" in signature(verifier.backbone.forward).parameters  # its name since transformers 5.24
    return {"cache" if named else "past_key_values": cache, "use_cache": True}


def solution_score(scores: Sequence[float], reduction: Reduction) -> float:
    """The mean, lowest or last of a solution's scores, or the log probability that all its steps are right."""
    if reduction == "product":
        return logsigmoid(torch.tensor(scores, dtype=torch.float64)).sum().item()
    if reduction == "mean":
        return sum(scores) / len(scores)
    return min(scores) if reduction == "min" else scores[-1]

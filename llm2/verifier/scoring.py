"""The verifier's score of every token of finished solutions, for ranking, weighted votes and the report's colours."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

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
        batch_size: sequences of a forward, batched by length.
        names: what an error calls each solution's problem; its index when None.

    Raises UserError where a score is NaN or infinite.
    """
    texts = [torch.tensor([*prompt, *solution]) for prompt, solution in zip(prompts, solutions, strict=True)]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    token_scores: dict[int, list[float]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = pad_sequence([texts[index] for index in batch], batch_first=True)  # (B, S), right-padded
        lengths = torch.tensor([len(texts[index]) for index in batch])
        keep = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, S)
        scores = verifier(ids.to(verifier.device), attention_mask=keep.long().to(verifier.device)).scores  # (B, S)
        for index, row in zip(batch, scores.float().cpu(), strict=True):
            row = row[len(prompts[index]) : len(texts[index])]
            if not row.isfinite().all():
                position = int(row.isfinite().logical_not().nonzero()[0])
                raise UserError(
                    f"{f'solution {index}' if names is None else f'problem {names[index]!r}'}, position "
                    f"{len(prompts[index]) + position} (token {position} of the solution): the verifier's score is "
                    f"{row[position].item()}, expected a finite number; try dtype=float32"
                )
            token_scores[index] = row.tolist()
    return [token_scores[index] for index in range(len(texts))]


def solution_score(scores: Sequence[float], reduction: Reduction) -> float:
    """The mean, lowest or last of a solution's scores, or the log probability that all its steps are right."""
    if reduction == "product":
        return logsigmoid(torch.tensor(scores, dtype=torch.float64)).sum().item()
    if reduction == "mean":
        return sum(scores) / len(scores)
    return min(scores) if reduction == "min" else scores[-1]

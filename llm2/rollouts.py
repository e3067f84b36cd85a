"""Many sampled continuations of many prefixes, by System 1 alone.

Knows how to put unequal prefixes into full batches. What the prefixes are and what the continuations are worth is the
business of `exploration` and `evaluation`.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from llm2.generation import Sampling, decode


def roll_out(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    eos: Sequence[int],
    batch_size: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[list[list[int]]]:
    """Continue each prefix once for each of its seeds.

    Args:
        prefixes: lists of token ids.
        seeds: for each prefix the same number n of seeds.
        batch_size: rows in flight.
        on_tokens: told after each batch how many tokens were generated, for a progress bar.

    Returns:
        for each prefix its n continuations, new tokens only. They depend on prefix and seed, not on the batching.
    """
    samples = len(seeds[0]) if seeds else 0
    per_batch = max(1, batch_size // max(samples, 1))
    # Prefixes of like length share a batch: little padding, and rows that finish at about the same time.
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    continuations: list[list[list[int]]] = [[] for _ in prefixes]
    for start in range(0, len(order), per_batch):
        chosen = order[start : start + per_batch]
        tokens = decode(
            model,
            [prefixes[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            eos=eos,
            sampling=sampling,
            seeds=[seed for i in chosen for seed in seeds[i]],
            num_return_sequences=samples,
        ).tokens
        for row, i in enumerate(chosen):
            continuations[i] = tokens[row * samples : (row + 1) * samples]
        on_tokens(sum(map(len, tokens)))
    return continuations

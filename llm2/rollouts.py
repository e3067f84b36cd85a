"""Many sampled continuations of many prefixes, by System 1 alone.

Knows in which order unequal prefixes are best continued. What the prefixes are and what the continuations are worth is
the business of `exploration`.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from llm2.generation import Sampling, stream


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
        seeds: for each prefix, a seed a continuation.
        batch_size: rows in flight.
        on_tokens: told as prefixes finish how many tokens were generated, for a progress bar.

    Returns:
        for each prefix its continuations, new tokens only. They depend on prefix and seed, not on the batching.
    """
    # The longest first: prefixes read together are of like length, and the run does not end on its slowest rows.
    order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
    continuations: list[list[list[int]]] = [[] for _ in prefixes]
    for index, rows in stream(
        model,
        [prefixes[i] for i in order],
        max_new_tokens=max_new_tokens,
        eos=eos,
        sampling=sampling,
        seeds=[seeds[i] for i in order],
        batch_size=batch_size,
    ):
        continuations[order[index]] = [row.tokens for row in rows]
        on_tokens(sum(len(row.tokens) for row in rows))
    return continuations

"""The slow reference: one sequence at a time, no cache, no branches, the whole prefix recomputed for every score."""

import math

import torch

from llm2.common.seeds import uniforms


@torch.inference_mode()
def score(verifier, ids: list[int]) -> float:
    """s(x_<t, v) where v is the last of `ids`."""
    return scores(verifier, ids[:-1], ids[-1:])[0]


@torch.inference_mode()
def scores(verifier, prefix: list[int], tokens: list[int]) -> list[float]:
    """s(prefix, v) of each token v, one text for each."""
    return verifier(torch.tensor([[*prefix, token] for token in tokens])).scores[:, -1].tolist()


@torch.inference_mode()
def decode_one(
    system1,
    prompt,
    *,
    max_new_tokens,
    eos,
    verifier=None,
    scored=None,
    alpha=0.1,
    beta=0.25,
    top_k=None,
    seed=None,
    temperature=1.0,
) -> list[int]:
    """Guided decoding as the paper writes it down; greedy without a seed.

    In a verifier's place, `scored` maps the tokens so far, the candidates and System 1's logits (V,) to scores.
    """
    if verifier is not None:
        scored = lambda ids, tokens, logits: scores(verifier, ids, tokens)  # noqa: E731
    ids = list(prompt)
    for step in range(max_new_tokens):
        logits = system1(torch.tensor([ids])).logits[0, -1]
        tokens = range(len(logits))
        if scored is not None:
            shares, values = logits.softmax(-1), logits.tolist()
            least, shares = (alpha * shares.max()).item(), shares.tolist()
            tokens = sorted((v for v in tokens if shares[v] >= least), key=lambda v: -shares[v])[:top_k]
            guided = [values[v] + beta * s for v, s in zip(tokens, scored(ids, tokens, logits), strict=True)]
        else:
            guided = logits.tolist()
        ids.append(tokens[_pick(guided, seed, step, temperature)])
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


def _pick(logits: list[float], seed: int | None, step: int, temperature: float) -> int:
    if seed is None:
        return max(range(len(logits)), key=logits.__getitem__)
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    point = uniforms(torch.tensor([seed]), torch.tensor([step])).item() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    raise AssertionError("a uniform number below 1 falls on the scale")

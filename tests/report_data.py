"""Results folders made up for the report page: as many problems as asked for, token by token."""

import json
import random
from pathlib import Path

WORDS = ("Anna", "has", "rings", "and", "twice", "as", "many", "blue", "ones", "they", "sold", "for", "left", "gave")
MODES = ("plain_greedy", "guided_greedy", "plain_sampling", "guided_sampling")


def write_many(folder: Path, n: int, metrics: dict, samples: int = 10, traced: int = 4, length: int = 50) -> None:
    """n problems of the testbed's size in four modes: `length` tokens, a choice at every eighth."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "n": n}))
    rng = random.Random(0)
    with open(folder / "predictions.jsonl", "w") as predictions, open(folder / "traces.jsonl", "w") as traces:
        for i in range(n):
            question = " ".join(rng.choices(WORDS, k=30)) + f"? Problem {i}."
            for mode in MODES:
                count = samples if "sampling" in mode else 1
                trace = made_trace(rng, length)
                answers = [str(rng.randrange(3)) for _ in range(count)]
                text = "".join(trace["tokens"])
                made = [
                    {"text": text, "answer": answer, "correct": answer == "1", "tokens": length, "score": 0.123}
                    for answer in answers
                ]
                line = {"id": f"test-{i}", "mode": mode}
                predictions.write(json.dumps({**line, "question": question, "gold": "1", "samples": made}) + "\n")
                traces.write(json.dumps({**line, "traces": [trace] * min(count, traced)}) + "\n")


def made_trace(rng: random.Random, length: int) -> dict:
    tokens = [f" {word}" for word in rng.choices(WORDS, k=length - 1)] + ["<|eot_id|>"]
    choices = [
        {
            "at": at,
            "candidates": [tokens[at], *(f" {word}" for word in rng.choices(WORDS, k=2))],
            "logprobs": [-0.2, -1.9, -3.1],
            "scores": [round(rng.gauss(0, 2), 3) for _ in range(3)],
            "chosen": 0,
            "changed": at % 3 == 0,
        }
        for at in range(0, length, 8)
    ]
    return {"tokens": tokens, "scores": [round(rng.gauss(0, 2), 3) for _ in range(length)], "choices": choices}

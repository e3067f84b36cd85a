"""The command `score`: finished solutions ranked by the verifier, best of n and weighted votes."""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from llm2.common.chat import Message, check_messages, resolve_template
from llm2.common.files import whole_file
from llm2.common.jsonl import read_jsonl
from llm2.common.loading import eos_ids, load_system1, load_tokenizer, resolve_device
from llm2.common.stats import best_of_k, vote_weights, weighted_majority_at_k
from llm2.config import ScoreConfig
from llm2.errors import UserError, quote, shorten
from llm2.tasks import Task, load_task
from llm2.verifier.load import load_verifier, require_same_template, require_verifier
from llm2.verifier.scoring import encode_solutions, score_solutions, solution_score
from llm2.verifier.steps import as_text, check_steps, read_steps

LINES = 64  # lines whose solutions are scored together


class Line(NamedTuple):
    number: int
    record: dict
    messages: list[Message]
    solutions: list[str | list[str]]  # texts, or their steps

    @property
    def texts(self) -> list[str]:
        return [*map(as_text, self.solutions)]


def check(config: ScoreConfig) -> list[Line]:
    """Read and check the lines of the file. Raises UserError before weights are loaded."""
    require_verifier(config.verifier)
    require_same_template(config.verifier, config.model, config.chat_template)
    if Path(config.output).absolute() == Path(config.file).absolute():
        raise UserError(f"output: found {config.output}, the file that is read; expected another one")
    lines = [_line(number, record, f"{config.file}, line {number}") for number, record in read_jsonl(config.file)]
    if not lines:
        raise UserError(f"{config.file}: expected at least one line, found none")
    return lines


def _line(number: int, record: dict, where: str) -> Line:
    messages, solutions = record.get("messages"), record.get("solutions")
    if solutions is None and record.get("completions") is not None:
        messages, steps = read_steps(record, where)
        solutions = [steps]
    for key, value in (("messages", messages), ("solutions", solutions)):
        if not isinstance(value, list) or not value:
            raise UserError(f"{where}: key {key!r}: expected a list that is not empty, found {quote(value)}")
    check_messages(messages, where)
    in_steps = all(isinstance(solution, list) for solution in solutions)
    for steps in solutions if in_steps else ():
        check_steps(steps, where, "solutions")
    for key, texts in (("solutions", () if in_steps else solutions), ("gold", [record.get("gold", "")])):
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"{where}: key {key!r}: expected a text, found {quote(wrong[0])}")
    return Line(number, record, messages, solutions)


def score(config: ScoreConfig) -> Iterator[str]:
    """Write config.output; yields the lines to print: one for each line of the file, then accuracies if graded."""
    lines, device = check(config), resolve_device(config.device)
    task = None if config.task is None else load_task(config.task)
    tokenizer, template = load_tokenizer(config.model), resolve_template(config.chat_template)
    system1 = load_system1(config.model, device, config.dtype)
    eos, vocabulary = eos_ids(system1, tokenizer), system1.config.get_text_config().vocab_size
    texts = []
    for line in tqdm(lines, desc="encode", unit="line", disable=None):
        try:
            texts.append(encode_solutions(tokenizer, line.messages, line.solutions, eos, template))
        except UserError as error:
            raise UserError(f"{config.file}, line {line.number}: {error}") from error
    verifier = load_verifier(config.verifier, device, config.dtype, vocabulary, system1, tokenizer)
    graded = task is not None and all("gold" in line.record for line in lines)
    accuracies, said = defaultdict(list), []
    with whole_file(config.output) as file, tqdm(total=len(lines), desc="score", unit="line", disable=None) as bar:
        for first in range(0, len(lines), LINES):
            chunk = [*zip(lines[first : first + LINES], texts[first : first + LINES], strict=True)]
            names = [f"line {line.number}" for line, _ in chunk for _ in line.solutions]
            encoded = [*chain.from_iterable(solutions for _, solutions in chunk)]
            rows = iter(score_solutions(verifier, encoded, batch_size=config.batch_size, names=names))
            for line, _ in chunk:
                found = [next(rows) for _ in line.solutions]
                ranked = rank(line, [solution_score(row, config.reduction) for row in found], task, graded)
                if isinstance(line.solutions[0], list):
                    ranked["step_scores"] = found
                for name, value in ranked.pop("accuracies").items():
                    accuracies[name].append(value)
                file.write(json.dumps(line.record | ranked, ensure_ascii=False) + "\n")
                said.append(_sentence(line, ranked))
            bar.update(len(chunk))
    yield from said
    for name, values in accuracies.items():
        yield f"{name}: {sum(values) / len(values):.1%} of {len(values)} problems"
    if task is not None:
        task.close()


def rank(line: Line, scores: list[float], task: Task | None, graded: bool) -> dict:
    """`scores` and `best`; with a task also `answers` and `vote`, the first answer with the largest sum of exp(score);
    if graded also `accuracies`, with ties split as in evaluation."""
    found = {"scores": scores, "best": scores.index(max(scores)), "accuracies": {}}
    if task is None:
        return found
    weights, votes = vote_weights(scores), defaultdict(float)
    if graded:
        gold, n = line.record["gold"], len(scores)
        grades = task.grade(line.texts, gold)
        answers, correct = [grade.answer for grade in grades], [grade.correct for grade in grades]
        right = next((answer for answer, good in zip(answers, correct, strict=True) if good), None)
        found["accuracies"] = {
            "mean of all solutions": sum(correct) / n,
            "majority vote": weighted_majority_at_k(answers, [1.0] * n, right, n),
            "weighted vote": weighted_majority_at_k(answers, weights, right, n),
            "best of n": best_of_k(scores, correct, n),
        }
    else:
        answers = [task.extract_answer(text) for text in line.texts]
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] += weight
    return found | {"answers": answers, "vote": max(votes, key=votes.get, default=None)}


def _sentence(line: Line, ranked: dict) -> str:
    best = ranked["best"]
    text = f"line {line.number}: best of {len(line.solutions)} is solution {best} ({ranked['scores'][best]:.3f})"
    if "vote" in ranked:
        text += f", weighted vote {ranked['vote']}"
    return f"{text}: {shorten(' '.join(line.texts[best].split()), 60)}"

"""Decode a benchmark in several modes on the same problems, grade, compare, write a results folder.

Knows how predictions are made, by one process or several, and what a results folder holds. Where they are kept is
`predictions`' business; answers are graded by the benchmark's grader, figures made by `metrics`, and what a person
looks at by `report`.
"""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from tqdm import tqdm

from llm2.common.chat import Message, encode_chats, resolve_template
from llm2.common.seeds import row_seed
from llm2.config import EvaluateConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.sampling import Completion, SamplingParams
from llm2.errors import UserError
from llm2.evaluation.metrics import summarise
from llm2.evaluation.predictions import Predictions
from llm2.evaluation.tracing import TokenText, trace_of
from llm2.tasks import Problem, Task, load_task
from llm2.tasks.few_shot import load_examples
from llm2.verifier.model import require_verifier
from llm2.verifier.scoring import score_tokens, solution_score

PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others
SCORED_TOGETHER = 16  # finished rows that wait for one forward of the verifier, and are then written
SETTINGS = (
    "model",
    "verifier",
    "alpha",
    "beta",
    "top_k",
    "temperature",
    "top_p",
    "num_samples",
    "few_shot",
    "num_fewshot",
)


def evaluate(config: EvaluateConfig) -> dict | None:
    """Fill `config.output_dir` with config.yaml, predictions, traces and metrics.json.

    Returns the metrics; None in the processes of `accelerate launch` other than the main one.
    """
    check(config)
    processes = PartialState(cpu=config.device == "cpu", timeout=PATIENCE)
    task = load_task(config.task, config.data_file, config.grader)
    problems = task.problems(config.split, config.limit)
    examples = load_examples(config.few_shot, config.num_fewshot)
    predictions = Predictions(config, processes)
    if any(predictions.missing(problems, mode) for mode in config.modes):
        llm2 = LLM2.from_pretrained(
            config.model, config.verifier, device=config.device, dtype=config.dtype, **config.guidance()
        )
        evaluation = Evaluation(config, llm2, examples, task)
        for mode in config.modes:
            evaluation.run(mode, problems, predictions, processes)
    task.close()
    processes.wait_for_everyone()
    metrics = None
    if processes.is_main_process:
        lines = predictions.publish(problems, config.modes)
        metrics = describe(config, len(problems)) | summarise(lines, config.majority_at, config.seed)
        Path(config.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    processes.wait_for_everyone()
    return metrics


def check(config: EvaluateConfig) -> None:
    """What one field alone cannot tell."""
    if config.verifier is None and any(mode.startswith("guided") for mode in config.modes):
        raise UserError("the guided modes need a verifier: set verifier=<folder>, or leave them out of modes")
    if max(config.majority_at, default=1) > config.num_samples:
        raise UserError(
            f"majority_at: found {max(config.majority_at)}, expected at most num_samples={config.num_samples}"
        )
    if config.verifier is not None:
        require_verifier(config.verifier)


def describe(config: EvaluateConfig, n: int) -> dict:
    """The head of metrics.json: what was measured, with what."""
    return {
        "benchmark": config.task,
        "split": config.split,
        "n": n,
        "seed": config.seed,
        "settings": {key: getattr(config, key) for key in SETTINGS},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit that the code stands at, with `-dirty` where it was changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Decoded(NamedTuple):
    """A problem with its prompt's token ids and what became of its rows."""

    problem: Problem
    prompt: list[int]
    rows: list[Completion]


class Evaluation:
    """Both systems with all it takes to predict and grade."""

    def __init__(self, config: EvaluateConfig, llm2: LLM2, examples: Sequence[Message], task: Task) -> None:
        self.config, self.llm2, self.examples, self.task = config, llm2, list(examples), task
        self.pieces = TokenText(llm2.tokenizer)

    def run(self, mode: str, problems: Sequence[Problem], predictions: Predictions, processes: PartialState) -> None:
        """Decode and grade this process's share of what is missing of one mode; what is done is written at once."""
        missing = predictions.missing(problems, mode)
        share = missing[processes.process_index :: processes.num_processes]
        right, seen = predictions.grades(problems, mode) if processes.is_main_process else (0, 0)
        with tqdm(total=len(share), desc=mode, unit="problem", disable=not processes.is_main_process) as bar:
            for group in _grouped(self._decode(mode, share), SCORED_TOGETHER if self._scores(mode) else 1):
                for entry in self._entries(mode, group):
                    predictions.add(entry)
                    right += sum(sample["correct"] for sample in entry["samples"])
                    seen += len(entry["samples"])
                    bar.set_postfix_str(f"accuracy {right / seen:.1%}", refresh=False)
                    bar.update()

    def _scores(self, mode: str) -> bool:
        return self.config.verifier is not None and (self.config.score_samples or mode.endswith("greedy"))

    def _decode(self, mode: str, problems: Sequence[Problem]) -> Iterator[Decoded]:
        """The problems in the order in which they are done."""
        config, guided, sampled = self.config, mode.startswith("guided"), mode.endswith("sampling")
        messages = [[*self.examples, *self.task.prompt(problem)] for problem in problems]
        template = resolve_template(config.chat_template)
        prompts = encode_chats(self.llm2.tokenizer, messages, template, generation_prompt=True)
        samples = config.num_samples if sampled else 1
        rows = Decoder(self.llm2.system1, self.llm2.guidance if guided else None).stream(
            prompts,
            max_new_tokens=config.max_new_tokens,
            eos=self.llm2.eos,
            sampling=SamplingParams(temperature=config.temperature, top_p=config.top_p) if sampled else None,
            seeds=[[row_seed(config.seed, problem.id, i) for i in range(samples)] for problem in problems],
            batch_size=config.batch_size,
            trace=guided and config.traced_samples > 0,
        )
        for index, written in rows:
            yield Decoded(problems[index], prompts[index], written)

    def _entries(self, mode: str, group: Sequence[Decoded]) -> Iterator[dict]:
        """A journal entry a problem: its line of predictions.jsonl, and `traces`."""
        scores = iter([])
        if self._scores(mode):
            prompts = [done.prompt for done in group for _ in done.rows]
            solutions = [row.token_ids for done in group for row in done.rows]
            scores = iter(score_tokens(self.llm2.guidance.verifier, prompts, solutions, SCORED_TOGETHER))
        for problem, _, rows in group:
            own = [next(scores, None) for _ in rows]
            traced = list(zip(rows, own, strict=True))[: self.config.traced_samples]
            yield {
                "id": problem.id,
                "question": problem.question,
                "gold": problem.gold,
                "mode": mode,
                "samples": self._samples(problem, rows, own),
                "traces": [trace_of(row, token_scores, self.pieces) for row, token_scores in traced],
            }

    def _samples(
        self, problem: Problem, rows: Sequence[Completion], scores: Sequence[list[float] | None]
    ) -> list[dict]:
        texts = self.llm2.tokenizer.batch_decode([row.token_ids for row in rows], skip_special_tokens=True)
        return [
            {
                "text": text,
                "answer": grade.answer,
                "correct": grade.correct,
                "correct_strict": grade.correct_strict,
                "tokens": len(row.token_ids),
                "verifier_forwards": row.num_verifier_calls,
                "score": None if own is None else round(solution_score(own, self.config.solution_score), 5),
            }
            for text, grade, row, own in zip(texts, self.task.grade(texts, problem.gold), rows, scores, strict=True)
        ]


def _grouped(decoded: Iterable[Decoded], rows: int) -> Iterator[list[Decoded]]:
    """Finished problems, in groups of at least so many rows (the last one may have fewer)."""
    group, held = [], 0
    for done in decoded:
        group.append(done)
        held += len(done.rows)
        if held >= rows:
            yield group
            group, held = [], 0
    if group:
        yield group

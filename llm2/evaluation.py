"""Decode a benchmark in several modes on the same problems, grade, compare, write a results folder.

Knows how predictions are made, kept and summed up. Answers are graded by `grading`, figures made by `statistics`, and
what a person looks at by `report`.
"""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from llm2.benchmarks import Problem, load_problems
from llm2.chat import encode_chats, resolve_template
from llm2.config import EvaluateConfig, difference, read_values, write_config
from llm2.errors import UserError
from llm2.generation import Sampling, Written, stream
from llm2.grading import extract_answer, is_correct
from llm2.metrics import summarise
from llm2.model import LLM2
from llm2.seeds import row_seed

FREE = ("output_dir", "modes", "limit", "majority_at", "batch_size", "resume", "device")  # may differ between parts


def evaluate(config: EvaluateConfig) -> dict:
    """Fill `config.output_dir` with config.yaml, predictions.jsonl and metrics.json; returns the metrics."""
    check(config)
    problems = load_problems(config.benchmark, config.split, config.limit, config.data_file)
    llm2 = LLM2.from_pretrained(
        config.model,
        config.verifier if any(mode.startswith("guided") for mode in config.modes) else None,
        config.alpha,
        config.beta,
        config.top_k,
        config.device,
        config.dtype,
    )
    folder = Path(config.output_dir)
    predictions = Predictions(folder, config)
    for mode in config.modes:
        run_mode(llm2, config, mode, problems, predictions)
    lines = predictions.of(problems, config.modes)
    metrics = {
        "benchmark": config.benchmark,
        "split": config.split,
        "n": len(problems),
        "seed": config.seed,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        **summarise(lines, config.majority_at, config.seed),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def check(config: EvaluateConfig) -> None:
    """What one field alone cannot tell."""
    if config.verifier is None and any(mode.startswith("guided") for mode in config.modes):
        raise UserError("the guided modes need a verifier: set verifier=<folder>, or leave them out of modes")
    if max(config.majority_at, default=1) > config.samples:
        raise UserError(f"majority_at: found {max(config.majority_at)}, expected at most samples={config.samples}")


def run_mode(
    llm2: LLM2, config: EvaluateConfig, mode: str, problems: Sequence[Problem], predictions: "Predictions"
) -> None:
    """Decode and grade what is missing of one mode; each problem is written as soon as it is done."""
    waiting = [problem for problem in problems if (problem.id, mode) not in predictions.lines]
    sampled = mode.endswith("sampling")
    samples = config.samples if sampled else 1
    decoded = stream(
        llm2.system1,
        _encode_prompts(llm2, config, waiting),
        max_new_tokens=config.max_new_tokens,
        eos=llm2.eos,
        guidance=llm2.guidance if mode.startswith("guided") else None,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p) if sampled else None,
        seeds=[[row_seed(config.seed, problem.id, i) for i in range(samples)] for problem in waiting],
        batch_size=config.batch_size,
    )
    done = [line for (_, other), line in predictions.lines.items() if other == mode]
    right = [sample["correct"] for line in done for sample in line["samples"]]
    with tqdm(total=len(problems), initial=len(problems) - len(waiting), desc=mode, unit="problem") as bar:
        for index, rows in decoded:
            line = prediction(llm2, mode, waiting[index], rows)
            predictions.add(line)
            right += [sample["correct"] for sample in line["samples"]]
            bar.set_postfix_str(f"accuracy {sum(right) / len(right):.1%}", refresh=False)
            bar.update()


def prediction(llm2: LLM2, mode: str, problem: Problem, rows: Sequence[Written]) -> dict:
    """A line of predictions.jsonl."""
    texts = llm2.tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
    samples = [
        {
            "text": text,
            "answer": extract_answer(text),
            "correct": is_correct(text, problem.gold),
            "correct_strict": is_correct(text, problem.gold, "strict"),
            "tokens": len(row.tokens),
            "verifier_forwards": row.verified,
        }
        for text, row in zip(texts, rows, strict=True)
    ]
    return {"id": problem.id, "question": problem.question, "gold": problem.gold, "mode": mode, "samples": samples}


def _encode_prompts(llm2: LLM2, config: EvaluateConfig, problems: Sequence[Problem]) -> list[list[int]]:
    template = resolve_template(config.chat_template)
    return encode_chats(llm2.tokenizer, [problem.prompt for problem in problems], template, generation_prompt=True)


class Predictions:
    """predictions.jsonl: written as it goes, read again after a kill; one line a problem and mode."""

    def __init__(self, folder: Path, config: EvaluateConfig) -> None:
        self.path, self.lines = folder / "predictions.jsonl", {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if config.resume:
                self._recover(folder / "config.yaml", config)
            else:
                self.path.unlink()
        write_config(config, folder / "config.yaml")
        self.file = self.path.open("a", encoding="utf-8")

    def _recover(self, earlier: Path, config: EvaluateConfig) -> None:
        if change := difference(read_values(earlier), config, FREE):
            raise UserError(
                f"{self.path} was made with another config: {change}; "
                "choose another output_dir, or pass resume=false to begin anew"
            )
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a kill may have left half a line
        self.path.write_bytes(whole)
        self.lines = {(line["id"], line["mode"]): line for line in map(json.loads, whole.decode().splitlines())}

    def add(self, line: dict) -> None:
        self.lines[line["id"], line["mode"]] = line
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def of(self, problems: Sequence[Problem], modes: Sequence[str]) -> dict[str, list[dict]]:
        """Each mode's lines, in the problems' order."""
        self.file.close()
        return {mode: [self.lines[problem.id, mode] for problem in problems] for mode in modes}

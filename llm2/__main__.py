"""The command line: llm2 COMMAND [config.yaml] [key=value ...], or `python -m llm2` instead of `llm2`.

The only module that imports every command.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from llm2.command_line import Command, add_command, add_commands, lazily, run_main
from llm2.config import EvaluateConfig, ExploreConfig, ScoreConfig, ServeConfig, SweepConfig, TrainConfig

# Imports are inside the functions: a misspelt key is reported at once, without seconds of importing torch.


def run_explore(config: ExploreConfig) -> None:
    from llm2.exploration.explore import explore
    from llm2.exploration.summary import render

    report = explore(config)
    if report is not None:  # the main process alone reports
        print(render(report))
        print(f"triplets in {config.output}")


def check_train(config: TrainConfig) -> None:
    """Check the first line of each file; other lines are checked by the training itself."""
    from llm2.verifier.triplets import read_records

    further = [*getattr(config, "further_files", ()), getattr(config, "eval_file", None)]
    for path in filter(None, [config.train_file, *further]):
        next(read_records(path), None)


def run_train(config: TrainConfig) -> None:
    from llm2.common.distributed import dist_info
    from llm2.verifier.pair_metrics import table
    from llm2.verifier.train import train

    metrics = train(config)
    if not dist_info().is_main:
        return
    print(table(metrics))
    n, share, *ends = (metrics[f"eval_pair{key}"] for key in ("s", "_accuracy", "_accuracy_low", "_accuracy_high"))
    interval = "{:.1%} [{:.1%}, {:.1%}]".format(share, *ends)
    if "system1_pair_accuracy" in metrics:
        system1 = f"System 1 in {metrics['system1_pair_accuracy']:.1%} (n = {n:.0f} pairs)"
        print(f"held-out pairs: verifier prefers gold in {interval}, {system1}")
    else:
        right = f"{metrics.get('eval_pairs_right', 0) / n:.1%} are right"
        print(f"held-out steps: the sign of the score is the label in {interval} (n = {n:.0f} steps, {right})")
    if "eval_guided_beta" in metrics:
        print(
            f"their guided order, logits and scores together: {metrics['eval_guided_pair_accuracy']:.1%} with "
            f"beta={metrics['eval_guided_beta']:g}, {metrics['eval_guided_pair_accuracy_plain']:.1%} without guidance"
        )
    if "eval_choice_beta" in metrics:
        print(
            f"quality of the chosen token less gold's at {metrics['eval_forks']:.0f} held-out forks: "
            f"{metrics['eval_choice_quality']:.4f} with beta={metrics['eval_choice_beta']:g}, "
            f"{metrics['eval_choice_quality_plain']:.4f} without guidance"
        )
    print(f"verifier in {config.output_dir}")


def check_evaluate(config: EvaluateConfig) -> None:
    from llm2.evaluation.evaluate import check
    from llm2.tasks import load_task, read_problems

    check(config)
    read_problems(load_task(config.task, config.data_file, config.grader), config.split, 1)


def run_and_report(name: str, config: EvaluateConfig) -> None:
    """Run the evaluating function MODULE:NAME and print its report."""
    from llm2.evaluation.report import write_report

    if lazily(name)(config) is not None:  # the main process alone reports
        print(write_report(config.output_dir))
        page = ": open report.html" if Path(config.output_dir, "report.html").exists() else ""
        print(f"results in {config.output_dir}{page}")


def run_score(config: ScoreConfig) -> None:
    from llm2.evaluation.rank import score

    for line in score(config):
        print(line)
    print(f"scores in {config.output}")


EVALUATE = partial(run_and_report, "llm2.evaluation.evaluate:evaluate")
SWEEP = partial(run_and_report, "llm2.evaluation.sweep:sweep")
COMMANDS = {
    "explore": Command(ExploreConfig, lazily("llm2.exploration.explore:prepare"), run_explore, parallel=True),
    "train": Command(TrainConfig, check_train, run_train, parallel=True),
    "evaluate": Command(EvaluateConfig, check_evaluate, EVALUATE, parallel=True),
    "sweep": Command(SweepConfig, check_evaluate, SWEEP, parallel=True),
    "score": Command(ScoreConfig, lazily("llm2.evaluation.rank:check"), run_score, "file"),
    "serve": Command(ServeConfig, lazily("llm2.vllm.serve:check"), lazily("llm2.vllm.serve:serve")),
}


def run_check(options: argparse.Namespace) -> None:
    from llm2.common.chat import resolve_template
    from llm2.common.loading import load_tokenizer
    from llm2.verifier.triplets import load_examples

    tokenizer = load_tokenizer(options.tokenizer)
    _, summary = load_examples(options.triplets, tokenizer, resolve_template(options.chat_template))
    print(f"{options.triplets}: {summary}; every position fits\n{summary.table()}")


def run_report(options: argparse.Namespace) -> None:
    from llm2.evaluation.report import write_report

    print(write_report(options.folder))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llm2", description="Verifier-guided decoding (LLM2, arXiv 2412.20372).")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(subparsers, COMMANDS)
    command = add_command(
        subparsers, "check", "Check every position of a triplets file with a tokenizer and a chat template.", run_check
    )
    command.add_argument("triplets", help="JSON lines of messages and samples")
    command.add_argument("--tokenizer", required=True, help="local folder or hub id")
    command.add_argument("--chat-template", help="name or Jinja file; the tokenizer's own when left out")
    command = add_command(subparsers, "report", "Rebuild table, plots and report.html of a results folder.", run_report)
    command.add_argument("folder", help="results folder with metrics.json")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return run_main(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())

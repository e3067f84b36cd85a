"""The command line: python -m llm2 COMMAND [config.yaml] [key=value ...]. The only module that imports every command.

Exit status: 0 done, 2 a user's mistake (one sentence, no traceback), 130 interrupted.
"""

import argparse
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm2.baselines.config import FinetuneConfig, OutcomeConfig, PreferConfig, SelfConsistencyConfig
from llm2.commands import CONFIGS
from llm2.common.config_file import help_text, load_config
from llm2.config import (
    EvaluateConfig,
    ExploreConfig,
    GenerateConfig,
    PretrainConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
)
from llm2.errors import UserError, of_the_machine
from llm2.study.config import StudyConfig


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llm2").setLevel(logging.INFO)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\nllm2 {options.command}: interrupted; finished work is kept", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else of_the_machine(error)
        if options.debug or sentence is None:
            raise
        tqdm.write(f"llm2 {options.command}: {sentence}", file=sys.stderr)  # on a line of its own below a bar
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llm2", description="Verifier-guided decoding (LLM2, arXiv 2412.20372).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, config in CONFIGS.items():
        command = _add_command(commands, name, config.__doc__.partition("\n")[0], run_command)
        command.epilog = f"keys:\n{help_text(config)}"
        command.add_argument(
            "arguments", nargs="*", metavar="[config.yaml] key=value", help="a file of keys, overrides"
        )
        command.add_argument(
            "--dry-run", action="store_true", help="check inputs; print processes and threads to start"
        )
    command = _add_command(commands, "benchmark", "Measure speed and memory on this machine.", run_benchmark)
    command.epilog = _benchmark_help()
    command.add_argument(
        "arguments", nargs="*", metavar="[config.yaml] key=value", help="a file of keys (`benchmark` is one), overrides"
    )
    command = _add_command(
        commands, "check", "Check every position of a triplets file with a tokenizer and a chat template.", run_check
    )
    command.add_argument("triplets", help="JSON lines of messages and samples")
    command.add_argument("--tokenizer", required=True, help="local folder or hub id")
    command.add_argument("--chat-template", help="name or Jinja file; the tokenizer's own when left out")
    command = _add_command(commands, "study", "Run the same steps for many settings, and compare.", run_study)
    command.epilog = f"keys:\n{help_text(StudyConfig)}"
    command.add_argument("config", help="a file of configs/studies")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--summary", action="store_true", help="run nothing; summarise what is there")
    which.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="run these alone (repeatable); the others are taken as published",
    )
    command = _add_command(commands, "report", "Rebuild table, plots and report.html of a results folder.", run_report)
    command.add_argument("folder", help="results folder with metrics.json")
    return parser


def _add_command(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return command


def _benchmark_help() -> str:
    from llm2.benchmarks.configs import BENCHMARKS

    return "\n\n".join(f"keys of benchmark={name}:\n{help_text(cls)}" for name, cls in BENCHMARKS.items())


def _file_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A first argument that is no key=value is the config file."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


# Imports are inside the functions: a misspelt key is reported at once, without seconds of importing torch.


def run_command(options: argparse.Namespace) -> None:
    config = load_config(CONFIGS[options.command], *_file_and_overrides(options.arguments))
    if hasattr(config, "model"):
        from llm2.common.loading import require_model, resolve_device

        resolve_device(config.device)
        require_model(config.model, decodes=getattr(config, "engine", "llm2") == "llm2")
    check, run = COMMANDS[options.command]
    if options.dry_run:
        from llm2.common.distributed import resolve_parallelism

        check(config)
        print(*resolve_parallelism(config))
        return
    from llm2.common.distributed import destroy_group

    with _claim(config):
        run(config)
        destroy_group()


def _claim(config: Any) -> AbstractContextManager:
    """Keeps other runs away from what this one writes."""
    from llm2.common.claim import claimed

    if hasattr(config, "output_dir"):
        return claimed(config.output_dir)
    return claimed(config.output, is_file=True) if hasattr(config, "output") else nullcontext()


def check_explore(config: ExploreConfig) -> None:
    from llm2.exploration.explore import prepare

    prepare(config)


def run_explore(config: ExploreConfig) -> None:
    from llm2.exploration.explore import explore
    from llm2.exploration.summary import render

    report = explore(config)
    if report is not None:  # the main process alone reports
        print(render(report))
        print(f"triplets in {config.output}")


def check_train(config: TrainConfig | PreferConfig) -> None:
    """Checks the first line of each file; errors that need the whole file surface later."""
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
    print(
        f"held-out pairs: verifier prefers gold in {metrics['eval_pair_accuracy']:.1%} "
        f"[{metrics['eval_pair_accuracy_low']:.1%}, {metrics['eval_pair_accuracy_high']:.1%}], "
        f"System 1 in {metrics['system1_pair_accuracy']:.1%} (n = {metrics['eval_pairs']:.0f} pairs)"
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


def run_evaluate(config: EvaluateConfig) -> None:
    from llm2.evaluation.evaluate import evaluate

    _report(evaluate(config), config.output_dir)


def run_sweep(config: SweepConfig) -> None:
    from llm2.evaluation.sweep import sweep

    _report(sweep(config), config.output_dir)


def _report(metrics: dict | None, folder: str) -> None:
    from llm2.evaluation.report import write_report

    if metrics is not None:  # the main process alone reports
        print(write_report(folder))
        page = ": open report.html" if Path(folder, "report.html").exists() else ""
        print(f"results in {folder}{page}")


def check_serve(config: ServeConfig) -> None:
    from llm2.vllm.serve import check

    check(config)


def run_serve(config: ServeConfig) -> None:
    from llm2.vllm.serve import serve

    serve(config)


def check_pretrain(config: PretrainConfig) -> None:
    from llm2.testbed.train.pretrain import check

    check(config)


def run_pretrain(config: PretrainConfig) -> None:
    from llm2.testbed.train.pretrain import pretrain

    pretrain(config)
    print(f"System 1 in {config.output_dir}")


def check_problems(config: FinetuneConfig | OutcomeConfig) -> None:
    from llm2.tasks import load_task, read_problems

    read_problems(load_task(config.task, config.data_file, config.grader), config.split, 1)


def run_finetune(config: FinetuneConfig) -> None:
    from llm2.baselines.finetune import finetune

    _print_counts(finetune(config), f"System 1 in {config.output_dir}")


def run_prefer(config: PreferConfig) -> None:
    from llm2.baselines.prefer import prefer

    _print_counts(prefer(config), f"System 1 in {config.output_dir}")


def run_outcome(config: OutcomeConfig) -> None:
    from llm2.baselines.outcome import train_outcome

    _print_counts(train_outcome(config), f"verifier in {config.output_dir}")


def _print_counts(counts: dict, end: str) -> None:
    print(*(f"{key} {value:,.6g}" for key, value in counts.items()), sep=", ")
    print(end)


def run_self_consistency(config: SelfConsistencyConfig) -> None:
    from llm2.baselines.self_consistency import compare

    result = compare(config)
    for name in ("self_consistency", "against"):
        side = result[name]
        low, high = side["ci95"]
        print(
            f"{name}: {side['accuracy']:.1%} [{low:.1%}, {high:.1%}], majority@{side['majority_at']}, "
            f"{side['tokens_per_problem']:,.1f} tokens a problem"
        )
    print(f"difference {result['paired']['difference']:+.1%}, p = {result['paired']['p']:.2g}, n = {result['n']}")


def run_generate(config: GenerateConfig) -> None:
    from llm2.testbed.train.generate import generate

    print(f"{generate(config):,} lines in {config.output}")


# Command -> (validates the inputs before workers are launched, runs the command).
COMMANDS = {
    "explore": (check_explore, run_explore),
    "train": (check_train, run_train),
    "evaluate": (check_evaluate, run_evaluate),
    "sweep": (check_evaluate, run_sweep),
    "finetune": (check_problems, run_finetune),
    "prefer": (check_train, run_prefer),
    "outcome": (check_problems, run_outcome),
    "self-consistency": (lambda config: None, run_self_consistency),
    "generate": (lambda config: None, run_generate),
    "serve": (check_serve, run_serve),
    "pretrain": (check_pretrain, run_pretrain),
}


def run_benchmark(options: argparse.Namespace) -> None:
    from llm2.benchmarks.configs import benchmark_class

    path, overrides = _file_and_overrides(options.arguments)
    config = load_config(benchmark_class(path, overrides), path, overrides)
    with _claim(config):
        print(import_module(f"llm2.benchmarks.{config.benchmark}").measure(config))
    print(f"written to {config.output}")


def run_check(options: argparse.Namespace) -> None:
    from llm2.common.chat import resolve_template
    from llm2.common.loading import load_tokenizer
    from llm2.verifier.triplets import load_examples

    tokenizer = load_tokenizer(options.tokenizer)
    _, summary = load_examples(options.triplets, tokenizer, resolve_template(options.chat_template))
    print(f"{options.triplets}: {summary}; every position fits\n{summary.table()}")


def run_study(options: argparse.Namespace) -> None:
    from llm2.study.run import check, run
    from llm2.study.table import write_summary

    config = load_config(StudyConfig, options.config)
    if options.summary:
        check(config, summary=True)
    else:
        with _claim(config):
            run(config, options.only)
    print(write_summary(config))
    print(f"table and data in {config.report}.md, .json and .runs.jsonl")


def run_report(options: argparse.Namespace) -> None:
    from llm2.evaluation.report import write_report

    print(write_report(options.folder))


if __name__ == "__main__":
    sys.exit(main())

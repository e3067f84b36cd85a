"""The command line: python -m llm2 <command> <config.yaml> [key=value ...]. The only module that knows every command.

Exit status: 0 done, 2 a user's mistake (one sentence, no traceback), 130 interrupted.
"""

import argparse
import sys
from importlib import import_module

from llm2.config import (
    EvaluateConfig,
    ExploreConfig,
    PretrainConfig,
    SweepConfig,
    TrainConfig,
    benchmark_class,
    load_config,
)
from llm2.errors import UserError

CONFIGS = {
    "explore": (ExploreConfig, "token quality exploration: gold solutions in, triplets out"),
    "train": (TrainConfig, "train the verifier on triplets"),
    "evaluate": (EvaluateConfig, "decode a benchmark with and without System 2 and compare"),
    "sweep": (SweepConfig, "choose alpha, beta, top_k, temperature on a validation split, then evaluate them"),
    "pretrain": (PretrainConfig, "train the testbed's System 1 from scratch"),
}


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"llm2 {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nllm2 {options.command}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm2", description="Verifier-guided decoding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (config, text) in CONFIGS.items():
        fields = ", ".join(config.__dataclass_fields__)
        command = commands.add_parser(name, help=text, description=f"{text}. Keys of the config: {fields}.")
        command.add_argument("config", help="YAML file with the fields of llm2/config.py")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="replace a field of the file")
        command.add_argument("--dry-run", action="store_true", help="only see whether everything needed is there")
        command.set_defaults(run=run_command)
    command = commands.add_parser("benchmark", help="measure speed and memory on this machine")
    command.add_argument("config", help="YAML file; its key `benchmark` says what is measured")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace a field of the file")
    command.set_defaults(run=run_benchmark)
    command = commands.add_parser("check", help="hold a triplets file against a tokenizer and a chat template")
    command.add_argument("triplets", help="JSON lines of messages and samples")
    command.add_argument("--tokenizer", required=True, help="local folder or hub id")
    command.add_argument("--chat-template", help="name or Jinja file; the tokenizer's own when left out")
    command.set_defaults(run=run_check)
    command = commands.add_parser("report", help="rebuild table and plots of a results folder")
    command.add_argument("folder", help="results folder with metrics.json")
    command.set_defaults(run=run_report)
    return parser


# Imports are inside: torch and transformers take seconds, and a misspelt key should be told at once.


def run_command(options: argparse.Namespace) -> None:
    config = load_config(CONFIGS[options.command][0], options.config, options.overrides)
    from llm2.processes import leave_group

    if options.command != "pretrain":
        from llm2.models import pick_device, require_model

        pick_device(config.device)
        require_model(config.model)
    if options.dry_run:
        if options.command in REHEARSALS:
            REHEARSALS[options.command](config)
        return
    run = {
        "explore": run_explore,
        "train": run_train,
        "evaluate": run_evaluate,
        "sweep": run_sweep,
        "pretrain": run_pretrain,
    }
    run[options.command](config)
    leave_group()


def plan_explore(config: ExploreConfig) -> None:
    """Tell mistakes before processes are started, and print how many to start and the threads of each."""
    from llm2.exploration import prepare
    from llm2.processes import plan

    prepare(config)
    print(*plan(config))


def look_at_triplets(config: TrainConfig) -> None:
    """Tell mistakes before processes are started: all but those that only reading the whole file shows."""
    from llm2.triplets import read_records

    for path in filter(None, (config.train_file, config.eval_file)):
        next(read_records(path), None)


def look_at_problems(config: EvaluateConfig) -> None:
    """Tell mistakes before processes are started."""
    from llm2.benchmarks import load_problems
    from llm2.evaluation import check
    from llm2.verifier import require_verifier

    check(config)
    if config.verifier is not None:
        require_verifier(config.verifier)
    load_problems(config.benchmark, config.split, 1, config.data_file)


REHEARSALS = {
    "explore": plan_explore,
    "train": look_at_triplets,
    "evaluate": look_at_problems,
    "sweep": look_at_problems,
}


def run_explore(config: ExploreConfig) -> None:
    from llm2.exploration import explore
    from llm2.exploration_report import render

    report = explore(config)
    if report is not None:  # one process speaks for all
        print(render(report))
        print(f"triplets in {config.output}")


def run_train(config: TrainConfig) -> None:
    from llm2.pairs import table
    from llm2.training import is_main, train

    metrics = train(config)
    if not is_main():
        return
    print(table(metrics))
    print(
        f"held-out pairs: verifier prefers gold in {metrics['eval_pair_accuracy']:.1%} "
        f"[{metrics['eval_pair_accuracy_low']:.1%}, {metrics['eval_pair_accuracy_high']:.1%}], "
        f"System 1 in {metrics['system1_pair_accuracy']:.1%} (n = {metrics['eval_pairs']:.0f} pairs)"
    )
    print(f"verifier in {config.output_dir}")


def run_evaluate(config: EvaluateConfig) -> None:
    from llm2.evaluation import evaluate
    from llm2.report import write_report

    if evaluate(config) is not None:  # None in all processes but the main one
        print(write_report(config.output_dir))
        print(f"results in {config.output_dir}: open report.html")


def run_sweep(config: SweepConfig) -> None:
    from llm2.report import write_report
    from llm2.sweep import sweep

    if sweep(config) is not None:
        print(write_report(config.output_dir))
        print(f"results in {config.output_dir}: open report.html")


def run_pretrain(config: PretrainConfig) -> None:
    from llm2.pretraining import pretrain

    pretrain(config)
    print(f"System 1 in {config.output_dir}")


def run_benchmark(options: argparse.Namespace) -> None:
    cls = benchmark_class(options.config)
    config = load_config(cls, options.config, options.overrides)
    measure = import_module(f"llm2.speed.{config.benchmark}").measure
    print(measure(config))
    print(f"written to {config.output}")


def run_check(options: argparse.Namespace) -> None:
    from llm2.chat import resolve_template
    from llm2.models import load_tokenizer
    from llm2.triplets import load_examples

    tokenizer = load_tokenizer(options.tokenizer)
    _, summary = load_examples(options.triplets, tokenizer, resolve_template(options.chat_template))
    print(f"{options.triplets}: {summary}; every position fits\n{summary.table()}")


def run_report(options: argparse.Namespace) -> None:
    from llm2.report import write_report

    print(write_report(options.folder))


if __name__ == "__main__":
    sys.exit(main())

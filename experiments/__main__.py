"""The laboratory: studies, the rivals of a verifier, what trains the testbed's System 1.

    python -m experiments COMMAND [config.yaml] [key=value ...]

Not part of the package: nothing in llm2 imports it.
"""

import argparse
import sys

from experiments.baselines.config import FinetuneConfig, OutcomeConfig, PreferConfig, SelfConsistencyConfig
from experiments.study.config import StudyConfig
from experiments.testbed.config import GenerateConfig, PretrainConfig
from llm2.__main__ import check_train
from llm2.command_line import Command, add_command, add_commands, claim, lazily, run_main
from llm2.common.config_file import help_text, load_config

# Imports are inside the functions: a misspelt key is reported at once, without seconds of importing torch.


def run_pretrain(config: PretrainConfig) -> None:
    from experiments.testbed.pretrain import pretrain

    pretrain(config)
    print(f"System 1 in {config.output_dir}")


def check_problems(config: FinetuneConfig | OutcomeConfig) -> None:
    from llm2.tasks import load_task, read_problems

    read_problems(load_task(config.task, config.data_file, config.grader), config.split, 1)


def run_finetune(config: FinetuneConfig) -> None:
    from experiments.baselines.finetune import finetune

    _print_counts(finetune(config), f"System 1 in {config.output_dir}")


def run_prefer(config: PreferConfig) -> None:
    from experiments.baselines.prefer import prefer

    _print_counts(prefer(config), f"System 1 in {config.output_dir}")


def run_outcome(config: OutcomeConfig) -> None:
    from experiments.baselines.outcome import train_outcome

    _print_counts(train_outcome(config), f"verifier in {config.output_dir}")


def _print_counts(counts: dict, end: str) -> None:
    print(*(f"{key} {value:,.6g}" for key, value in counts.items()), sep=", ")
    print(end)


def run_self_consistency(config: SelfConsistencyConfig) -> None:
    from experiments.baselines.self_consistency import compare

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
    from experiments.testbed.generate import generate

    print(f"{generate(config):,} lines in {config.output}")


COMMANDS = {
    "finetune": Command(FinetuneConfig, check_problems, run_finetune),
    "prefer": Command(PreferConfig, check_train, run_prefer),
    "outcome": Command(OutcomeConfig, check_problems, run_outcome),
    "self-consistency": Command(SelfConsistencyConfig, lambda config: None, run_self_consistency),
    "generate": Command(GenerateConfig, lambda config: None, run_generate),
    "pretrain": Command(PretrainConfig, lazily("experiments.testbed.pretrain:check"), run_pretrain),
}


def run_study(options: argparse.Namespace) -> None:
    from experiments.study.run import check, run
    from experiments.study.table import write_summary

    config = load_config(StudyConfig, options.config)
    if options.summary:
        check(config, summary=True)
    else:
        with claim(config):
            run(config, options.only)
    print(write_summary(config))
    print(f"table and data in {config.report}.md, .json and .runs.jsonl")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="experiments", description="Studies of LLM2, and the rivals of a verifier.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(subparsers, COMMANDS)
    command = add_command(subparsers, "study", "Run the same steps for many settings, and compare.", run_study)
    command.epilog = f"keys:\n{help_text(StudyConfig)}"
    command.add_argument("config", help="a file of experiments/studies")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--summary", action="store_true", help="run nothing; summarise what is there")
    which.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="run these alone (repeatable); the others are taken as published",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    return run_main(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())

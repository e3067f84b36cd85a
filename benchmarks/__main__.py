"""Measure speed and memory on this machine: python -m benchmarks [config.yaml] [key=value ...]"""

import argparse
import sys
from importlib import import_module

from benchmarks.configs import BENCHMARKS, benchmark_class
from llm2.command_line import add_keys, claim, file_and_overrides, run_main, set_run
from llm2.common.config_file import help_text, load_config


def run_benchmark(options: argparse.Namespace) -> None:
    path, overrides = file_and_overrides(options.arguments)
    config = load_config(benchmark_class(path, overrides), path, overrides)
    with claim(config):
        print(import_module(f"benchmarks.{config.benchmark}").measure(config))
    print(f"written to {config.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "Measure speed and memory on this machine; the key `benchmark` says what."
    parser.epilog = "\n\n".join(f"keys of benchmark={name}:\n{help_text(cls)}" for name, cls in BENCHMARKS.items())
    add_keys(parser)
    return set_run(parser, run_benchmark)


def main(arguments: list[str] | None = None) -> int:
    return run_main(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())

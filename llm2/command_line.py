"""Shared by the command lines of llm2, experiments and benchmarks: arguments, overrides, locks, error messages.

Exit status: 0 on success, 2 for a user's mistake (one sentence, no traceback), 130 when interrupted.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

from tqdm import tqdm

from llm2.common.config_file import help_text, load_config
from llm2.errors import UserError, of_the_machine


class Command(NamedTuple):
    """A command whose arguments are the keys of a config."""

    config: type
    check: Callable[[Any], None]  # validates the inputs, before processes start
    run: Callable[[Any], None]
    file_key: str | None = None  # key that a first argument ending in .jsonl sets
    parallel: bool = False  # llm2 starts it in several processes


LAUNCH_OPTIONS = {
    "processes": ("NUM_PROCESSES", "N", "start N, on all machines; default: one a GPU, or `tensor_parallel` GPUs"),
    "accelerate-config": ("ACCELERATE_CONFIG", "FILE", "of `accelerate config`; default: none, plain data parallelism"),
    "accelerate-args": ("ACCELERATE_ARGS", "ARGS", "more arguments of `accelerate launch`, such as '--num_machines 2'"),
}


def run_main(parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Run the function that the chosen command has set as `run`; returns the exit status."""
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llm2").setLevel(logging.INFO)
    name = " ".join(filter(None, (parser.prog, getattr(options, "command", None))))
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; finished work is kept", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else of_the_machine(error)
        if options.debug or sentence is None:
            raise
        tqdm.write(f"{name}: {sentence}", file=sys.stderr)  # on its own line, below a progress bar
        return 2
    return 0


def lazily(name: str) -> Callable:
    """The function MODULE:NAME, imported when it is called: importing torch takes seconds."""
    module, _, function = name.partition(":")
    return lambda *arguments: getattr(import_module(module), function)(*arguments)


def add_commands(subparsers: Any, commands: Mapping[str, Command]) -> None:
    for name, command in commands.items():
        parser = add_command(subparsers, name, command.config.__doc__.partition("\n")[0], _run)
        parser.set_defaults(definition=command)
        parser.epilog = f"keys:\n{help_text(command.config)}"
        add_keys(parser)
        parser.add_argument("--dry-run", action="store_true", help="check inputs; print processes and threads to start")
        for option, (variable, metavar, text) in LAUNCH_OPTIONS.items() if command.parallel else ():
            help_ = f"{text} (or {variable} in the environment)"
            parser.add_argument(f"--{option}", default=os.environ.get(variable), metavar=metavar, help=help_)


def add_command(
    subparsers: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return set_run(parser, run)


def set_run(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="[config.yaml] key=value", help="a file of keys, overrides")


def file_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The config file, if the first argument is not of the form key=value, and the remaining arguments."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


def claim(config: Any) -> AbstractContextManager:
    """Lock the output of a config against other runs."""
    from llm2.common.claim import lock_output

    if hasattr(config, "output_dir"):
        return lock_output(config.output_dir)
    return lock_output(config.output, is_file=True) if hasattr(config, "output") else nullcontext()


# Imports are inside the functions: a misspelt key is reported at once, without seconds of importing torch.


def _run(options: argparse.Namespace) -> None:
    _, check, run, file_key, parallel = options.definition
    file, overrides = file_and_overrides(options.arguments)
    if file_key is not None and file is not None and file.endswith(".jsonl"):
        file, overrides = None, [f"{file_key}={json.dumps(file)}", *overrides]
    config = load_config(options.definition.config, file, overrides)
    if hasattr(config, "model"):
        from llm2.common.loading import require_model, resolve_device

        resolve_device(config.device)
        require_model(config.model, decodes=getattr(config, "engine", "llm2") == "llm2")
    from llm2.common.distributed import destroy_group, launch, resolve_parallelism

    if options.dry_run:
        check(config)
        print(*resolve_parallelism(config, getattr(options, "processes", "1")))
        return
    if parallel:
        launch(config, check, options, [options.command, *options.arguments, *["--debug"] * options.debug])
    with claim(config):
        run(config)
        destroy_group()

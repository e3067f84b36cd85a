"""The commands of a study's steps: those of `python -m llm2` and of `python -m experiments`, each with its config."""

from experiments.__main__ import COMMANDS as OWN
from llm2.__main__ import COMMANDS

CONFIGS = {name: command.config for name, command in {**COMMANDS, **OWN}.items()}
MODULES = {name: "llm2" if name in COMMANDS else "experiments" for name in CONFIGS}  # for `python -m`

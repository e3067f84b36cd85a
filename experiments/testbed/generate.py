"""Writes the testbed's generated data to a file, for tools that do not draw it themselves as the tasks do."""

import json
from pathlib import Path

from experiments.testbed.config import GenerateConfig
from experiments.testbed.corpus import two_skills_conversations
from experiments.testbed.regimes import REGIMES, sorting_problems
from llm2.common.files import write_text
from llm2.testbed.generator import problems

CORPUS_SIZE = 20_000  # conversations where no limit is given


def generate(config: GenerateConfig) -> int:
    """Write `config.output`; returns the number of its lines."""
    if config.corpus:
        records = [{"messages": each} for each in two_skills_conversations(config.limit or CORPUS_SIZE, config.seed)]
    elif config.regime == "sorting":
        records = sorting_problems(config.split, config.limit)
    else:
        records = problems(config.split, config.limit, REGIMES[config.regime])
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_text(config.output, "".join(json.dumps(record) + "\n" for record in records))
    return len(records)

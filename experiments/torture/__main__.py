"""The long tests: python -m experiments.torture [PART ...] [--scale SHARE]; bash scripts/torture.sh calls it.

Each part has a folder under results/torture/ and leaves NAME.json there when it is done, after which it is skipped.
When all are done at full scale, the table is written to figs/torture/, with the plots of the soak.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from llm2.common.files import write_text
from tests.robustness.row import Row

PARTS = ["bad_input", "kills", "fuzz", "determinism", "exits", "soak", "network", "page"]
RESULTS, PAGE = Path("results", "torture"), Path("figs", "torture")


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts that have no result yet; the exit status is 1 if anything has failed in one of those asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.torture", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all when none is given: {', '.join(PARTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="size of what is not done yet; 1 is the full size")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*PARTS}:
        parser.error(f"found the part {min(unknown)!r}, expected some of {', '.join(PARTS)}")
    asked = options.parts or PARTS
    for name in asked:
        if result(name).exists():
            print(f"{name}: done already; delete {result(name)} and {RESULTS / name}/ to run it anew", flush=True)
        else:
            run_part(name, options.scale)
    table = as_table({name: read_rows(name) for name in PARTS if result(name).exists()})
    write_text(RESULTS / "table.md", table)
    print(table)
    if all(result(name).exists() and read(name)["scale"] == 1 for name in PARTS):
        publish(table)
    return int(any(row.failed for name in asked for row in read_rows(name)))


def result(name: str) -> Path:
    return RESULTS / f"{name}.json"


def run_part(name: str, scale: float) -> None:
    folder, start, part = RESULTS / name, time.perf_counter(), import_module(f"experiments.torture.{name}")
    if not hasattr(part, "RESUMES"):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    rows = part.run(folder.resolve(), scale)
    content = {"scale": scale, "seconds": round(time.perf_counter() - start), "rows": [asdict(row) for row in rows]}
    write_text(result(name), json.dumps(content, indent=2) + "\n")


def read(name: str) -> dict:
    return json.loads(result(name).read_text(encoding="utf-8"))


def read_rows(name: str) -> list[Row]:
    return [Row(**row) for row in read(name)["rows"]]


def as_table(results: dict[str, list[Row]]) -> str:
    """Markdown."""
    lines = ["| part | what | tried | failed | |", "|---|---|---|---|---|"]
    for name, rows in results.items():
        lines += [f"| {name} | {row.what} | {row.tried:,} | {row.failed:,} | {cell(row.detail)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def publish(table: str) -> None:
    """The page of a whole run."""
    plots = sorted((RESULTS / "soak").glob("*/*.svg"))
    by = f"By `bash scripts/torture.sh`, {date.today()}, {os.cpu_count()} CPU cores, torch {version('torch')}."
    lines = ["# Faults, bad input, long runs", "", by, "", "| part | tried | failed |", "|---|---|---|"]
    for name in PARTS:
        rows = read_rows(name)
        lines.append(f"| {name} | {sum(row.tried for row in rows):,} | {sum(row.failed for row in rows):,} |")
    lines += ["", table, *(f"![Soak: {plot.stem}]({plot.name})" for plot in plots)]
    PAGE.mkdir(parents=True, exist_ok=True)
    write_text(PAGE / "README.md", "\n".join(lines) + "\n")
    for plot in plots:
        shutil.copy(plot, PAGE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does: modules of tests import each other by name
    sys.exit(main())

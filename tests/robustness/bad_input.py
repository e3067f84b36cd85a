"""Bad input through the real commands: exit status 2, one sentence, no traceback, and nothing on disk is harmed.

`bad_cases` and `bad_models` hold the cases. In the long run each is a process of its own, and is started again with
--debug, which must show a traceback.
"""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from unittest import mock

from llm2.common.files import write_text
from tests.robustness.commands import ROOT, environment, keep_to_permissions, module_of
from tests.robustness.row import Row

RESUMES = True
PROGRESS = re.compile(r"\d+%\||\d+(\.\d+)?(s/)?(it|problem|run)s?(/s)?\b")  # bars of tqdm


@dataclass(frozen=True)
class Case:
    """A mistake: `make` writes what the command needs into a folder and returns its arguments."""

    name: str
    kind: str
    make: Callable[[Path, "Stock"], list[str]]
    says: tuple[str, ...]  # parts of the sentence: file, line, key, found, expected
    lines: int = 1  # of the answer: the report of misfits lists some
    process: bool = False  # needs one of its own, in which even root keeps to the permissions of files
    slow: bool = False  # not among the quick tests


class Stock:
    """What the cases share: a verifier, triplets, and a server that answers nonsense."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.triplets = (ROOT / "dataset" / "testbed.jsonl").read_text(encoding="utf-8").splitlines()[:4]
        self.answers: dict[str, object] = {}  # first part of a URL's path -> what /completions answers there
        self.models: dict[str, object] = {}  # the same for /models

    @cached_property
    def verifier(self) -> Path:
        """Untrained, from the testbed's System 1."""
        from llm2.common.loading import load_tokenizer
        from llm2.verifier.model import ProcessVerifier

        ProcessVerifier.from_system1("testbed").save_pretrained(self.folder / "verifier")
        load_tokenizer("testbed").save_pretrained(self.folder / "verifier")
        return self.folder / "verifier"

    @cached_property
    def port(self) -> int:
        stock = self

        class Nonsense(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(stock.models.get(self._name(), {"data": [{"id": "the-model"}]}))

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(stock.answers[self._name()])

            def _name(self) -> str:
                return self.path.split("/")[1]

            def _answer(self, content: object) -> None:
                body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Nonsense)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        return http.server_port

    def server(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}/v1"


def attack(case: Case, folder: Path, stock: Stock, as_process: bool = False) -> str | None:
    """What went wrong; None if the command refused its input as it should."""
    folder.mkdir(parents=True)
    arguments = case.make(folder, stock)
    before = contents(folder)
    status, answer = (in_process if as_process or case.process else here)(arguments, folder)
    after = contents(folder)
    sentence = f"{module_of(arguments[0])} {arguments[0]}: "
    said = [line for line in re.split(r"[\r\n]+", answer) if line.strip() and not PROGRESS.search(line)]
    if status != 2:
        return f"exit status {status}, expected 2: {answer[-1500:]}"
    if "Traceback" in answer or not said or not said[0].startswith(sentence):
        return f"expected `{sentence}...`, found {answer[-1500:]}"
    if len(said) > case.lines:
        return f"expected {case.lines} line, found {len(said)}: {answer[-1500:]}"
    if missing := [part for part in case.says if part.replace("FOLDER", str(folder)) not in answer]:
        return f"expected {missing} in the sentence, found {answer[-1500:]}"
    if changed := [name for name, content in before.items() if after.get(name) != content]:
        return f"changed or deleted: {changed}"
    return None


def main_of(command: str) -> Callable[[list[str]], int]:
    return import_module(f"{module_of(command)}.__main__").main


def here(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and stderr of the command line function, in this process."""
    main = main_of(arguments[0])
    err, modules, path = io.StringIO(), set(sys.modules), list(sys.path)
    patches = [mock.patch("llm2.vllm.client.ATTEMPTS", 1), mock.patch("llm2.tasks.task.GRADER_SECONDS", 0.5)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(contextlib.chdir(folder))
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            status = 1
            err.write(traceback.format_exc())
    for name in set(sys.modules) - modules:  # of the case's folder: the next case may have one of the same name
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = path
    return status, err.getvalue()


def in_process(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and stderr of the command as a user starts it."""
    finished = subprocess.run(
        [sys.executable, "-m", module_of(arguments[0]), *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=keep_to_permissions,
    )
    return finished.returncode, finished.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def debug_shows_traceback(case: Case, folder: Path, stock: Stock) -> bool:
    folder.mkdir(parents=True)
    status, answer = in_process([*case.make(folder, stock), "--debug"], folder)
    return status == 1 and "Traceback" in answer


def all_cases() -> list[Case]:
    from tests.robustness import bad_cases, bad_models

    return [*bad_cases.CASES, *bad_models.CASES]


def run(folder: Path, scale: float) -> list[Row]:
    """Every case as a process, and again with --debug; with a scale below 1 the first ones of each kind.

    Cases that have been refused as they should are in refused.json, and are not tried again.
    """
    tried, failed, details, debug_failed = Counter(), Counter(), {}, []
    stock, cases, kept = Stock(folder / "stock"), all_cases(), folder / "refused.json"
    refused = json.loads(kept.read_text()) if kept.exists() else []
    totals = Counter(case.kind for case in cases)
    for number, case in enumerate(cases):
        if tried[case.kind] >= max(1, scale * totals[case.kind]):
            continue
        tried[case.kind] += 1
        name, place = f"{case.kind}: {case.name}", folder / str(number)
        if name in refused:
            continue
        shutil.rmtree(place, ignore_errors=True)
        problem = attack(case, place / "case", stock, as_process=True)
        if problem is not None:
            failed[case.kind] += 1
            details.setdefault(case.kind, case.name)
        if not (debug := debug_shows_traceback(case, place / "debug", stock)):
            debug_failed.append(case.name)
        if problem is None and debug:
            write_text(kept, json.dumps(refused := [*refused, name], indent=1) + "\n")
            shutil.rmtree(place)
        print(f"{name}: {problem or 'refused'}", flush=True)
    rows = [Row(f"bad input: {kind}", tried[kind], failed[kind], details.get(kind, "")) for kind in tried]
    return [*rows, Row("--debug shows the traceback", tried.total(), len(debug_failed), ", ".join(debug_failed[:3]))]

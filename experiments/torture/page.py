"""report.html of 20,000 problems in Chromium: how long until it can be used, searched and filtered, and its memory."""

import time
from pathlib import Path

from llm2.evaluation.report import write_report
from tests.browser import CHROMIUM, chromium, heap_mib, opened
from tests.report_data import write_many
from tests.robustness.row import Row

PROBLEMS = 20_000
LIMITS = {"first view": 10.0, "first search": 3.0, "search": 1.0, "filter": 1.0}  # seconds, on a slow core
MAX_HEAP = 1024  # MiB
# Acts, lays the page out, and returns the seconds.
TIMED = """async (act) => {
  const begun = performance.now();
  if (act === 'filter') document.querySelector('[data-kind=fixed]').click();
  else { $('search').value = act; $('search').dispatchEvent(new Event('input')); }
  document.body.offsetHeight;
  return (performance.now() - begun) / 1000;
}"""


def measure(folder: Path, n: int, browser) -> dict[str, float]:
    """Seconds of writing, opening, searching and filtering the page of n problems; its MB and its heap in MiB."""
    modes = {"plain_greedy": 0.5, "guided_greedy": 0.6, "plain_sampling": 0.4, "guided_sampling": 0.5}
    figures = {mode: {"accuracy": accuracy} for mode, accuracy in modes.items()}
    write_many(folder, n, {"benchmark": "testbed", "split": "test", "n": n, "modes": figures})
    begun = time.perf_counter()
    write_report(folder)
    measured = {"writing": time.perf_counter() - begun, "MB": (folder / "report.html").stat().st_size / 1e6}
    begun = time.perf_counter()
    with opened(browser, folder / "report.html") as page:
        page.wait_for_selector("#detail .question")
        measured["first view"] = time.perf_counter() - begun
        measured["first search"] = page.evaluate(TIMED, f"problem {n - 1}.")
        assert page.inner_text("#count") == f"1 of {n:,} problems"
        measured["search"] = page.evaluate(TIMED, "")
        assert page.locator(".row").count() < 40, "only the rows in view exist"
        measured["filter"] = page.evaluate(TIMED, "filter")
        measured["heap"] = heap_mib(page)
    return measured


def run(folder: Path, scale: float) -> list[Row]:
    n = max(100, round(PROBLEMS * scale))
    if CHROMIUM is None:
        return [Row(f"report page of {n:,} problems", 0, 0, "no Chromium on the path")]
    with chromium() as browser:
        return [judge(n, measure(folder, n, browser))]


def judge(n: int, measured: dict[str, float]) -> Row:
    slow = [name for name, limit in LIMITS.items() if measured[name] > limit]
    figures = ", ".join(f"{name} {measured[name]:.2f} s" for name in ("writing", *LIMITS))
    detail = f"{measured['MB']:.0f} MB; {figures}; {measured['heap']:.0f} MiB of JavaScript objects"
    return Row(f"report page of {n:,} problems", len(LIMITS) + 1, len(slow) + (measured["heap"] > MAX_HEAP), detail)

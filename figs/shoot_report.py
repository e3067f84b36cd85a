"""Takes figs/report.png and figs/report_dark.png, the HTML report in Chromium: `python -m figs.shoot_report RESULTS`.

The page is open at a problem that guidance fixed, with the candidates of a changed token.
Needs Chromium on the path (apt-get install chromium).
"""

import sys
from pathlib import Path

from llm2.errors import UserError
from tests.browser import CHROMIUM, chromium, opened

# Select the problem with the most changed tokens among the first 200 that are fixed.
SELECT = """() => {
  const changes = (problem) => problem.modes.guided_greedy[0][4][2].filter((choice) => choice[5]).length;
  select(shown.slice(0, 200).reduce((best, problem) => changes(problem) > changes(best) ? problem : best));
}"""


def main(results: str) -> None:
    if CHROMIUM is None:
        raise UserError("shoot_report needs chromium on the path, found none: apt-get install chromium")
    with chromium() as browser:
        for name, theme in (("report.png", "light"), ("report_dark.png", "dark")):
            size = {"width": 1500, "height": 1600}
            with opened(browser, Path(results, "report.html").resolve(), color_scheme=theme, viewport=size) as page:
                page.click("[data-kind=fixed]")
                page.evaluate(SELECT)
                changed = page.query_selector_all(".text .changed")
                changed[min(1, len(changed) - 1)].click()
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=Path(__file__).parent / name)


if __name__ == "__main__":
    main(sys.argv[1])

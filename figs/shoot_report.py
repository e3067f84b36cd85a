"""Takes figs/report.png and figs/report_dark.png, the HTML report in Chromium: `python -m figs.shoot_report RESULTS`.

The page is open at a problem that guidance fixed, with the candidates of a changed token.
Needs `chromium` on the path (apt-get install chromium).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llm2.errors import UserError

SIZE = (1500, 1600)  # pixels
# Show the fixed problems, select the one with the most changed tokens among the first 200, click on such a token.
CLICKS = """
document.querySelector('#filters [data-kind=fixed]').click();
const changes = (problem) => problem.modes.guided_greedy[0][4][2].filter((choice) => choice[5]).length;
select(shown.slice(0, 200).reduce((best, problem) => changes(problem) > changes(best) ? problem : best));
scrollTo(0, 0);
const changed = document.querySelectorAll('.text .changed');
changed[changed.length > 1 ? 1 : 0]?.click();
"""


def main(results: str) -> None:
    page = Path(results, "report.html").read_text(encoding="utf-8")
    chromium = shutil.which("chromium")
    if chromium is None:
        raise UserError("shoot_report needs chromium on the path, found none: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        for name, theme in (("report.png", "light"), ("report_dark.png", "dark")):
            themed = page.replace("<html ", f'<html data-theme="{theme}" ', 1)
            clicked = re.sub(r"</script>\s*</body>", lambda end: CLICKS + end[0], themed)
            (Path(folder) / "page.html").write_text(clicked, encoding="utf-8")
            shoot(chromium, Path(folder) / "page.html", Path(__file__).parent / name)


def shoot(chromium: str, page: Path, picture: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    size = f"--window-size={SIZE[0]},{SIZE[1]}"
    subprocess.run(
        [chromium, *options, size, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True
    )


if __name__ == "__main__":
    main(sys.argv[1])

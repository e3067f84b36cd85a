"""report.html in headless Chromium: quiet, alone, accessible, and deaf to what a model or a task writes."""

import json

import pytest
from browser import chromium, needs_chromium, opened, violations
from report_data import MODES, write_many
from test_report import SWEPT

from experiments.torture import page as torture_page
from llm2.evaluation.report import write_report

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_many(folder, 200, SWEPT, samples=5, traced=2)
    write_report(folder)
    return folder / "report.html"


def test_no_two_elements_share_an_id(browser, report):
    """The charts are three documents in one."""
    with opened(browser, report) as page:
        ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(ids) == len(set(ids)) > 100
        used = page.evaluate("() => [...document.querySelectorAll('use, [clip-path]')].length")
        assert used > 10 and page.evaluate("""() => [...document.querySelectorAll('[clip-path]')].every(
            (each) => document.getElementById(each.getAttribute('clip-path').slice(5, -1)))""")


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_mend(scheme, width, browser, report):
    with opened(browser, report, color_scheme=scheme, viewport={"width": width, "height": 900}) as page:
        assert violations(page) == []
        page.click("summary")
        page.click("[data-kind=fixed]")
        page.click(".choice.changed >> nth=0")
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.click("#theme")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"


def test_problems_are_listed_filtered_and_searched(browser, report):
    with opened(browser, report) as page:
        problems = page.evaluate(
            "data.problems.map(([id, , , modes]) => [id, modes.plain_greedy, modes.guided_greedy])"
        )
        fixed = [id for id, ((_, plain, *_),), ((_, guided, *_),) in problems if guided and not plain]
        assert 0 < page.locator(".row").count() < 40, "only the rows in view exist"
        page.click("[data-kind=fixed]")
        assert page.inner_text("#count") == f"{len(fixed)} of 200 problems"
        assert page.inner_text(".row[aria-selected=true] b") == fixed[0]
        page.fill("#search", f"PROBLEM {fixed[-1].removeprefix('test-')}.")
        assert page.locator(".row b").all_inner_texts() == fixed[-1:]
        page.fill("#search", "no such words")
        assert page.inner_text("#detail") == "No problem matches."


def test_the_address_names_the_problem_and_opens_it_again(browser, report):
    with opened(browser, report) as page:
        page.click(".row >> nth=3")
        page.wait_for_timeout(1000)  # the address follows a selection by 0.3 s
        assert page.url.endswith("#test-3")
        for address, problem in (("#test-150", "test-150"), ("#%zz", "test-0")):
            page.evaluate("address => location.hash = address", address)
            page.reload()
            assert page.inner_text(".row[aria-selected=true] b") == problem


FOCUSED = """() => {
  const at = document.activeElement, style = getComputedStyle(at);
  return [at.tagName, at.id || at.dataset.kind || at.className || at.textContent, style.outlineStyle];
}"""


def test_every_control_is_reached_and_worked_by_keyboard(browser, report):
    with opened(browser, report) as page:
        page.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            tag, name, outline = page.evaluate(FOCUSED)
            assert tag == "BODY" or outline not in ("none", ""), f"no visible focus on {tag} {name}"
            reached.append(name)
        controls = ["Results", "Problems", "theme", "search", "fixed", "broken", "wrong", "right", "list", "detail"]
        assert [name for name in controls if name not in reached] == []
        assert any("choice" in name for name in reached), "tokens with a choice"

        page.focus("#theme")
        page.keyboard.press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.focus("[data-kind=broken]")
        page.keyboard.press("Space")
        assert page.get_attribute("[data-kind=broken]", "aria-pressed") == "true"
        page.focus("#list")
        page.keyboard.press("End")
        row = page.get_attribute("#list", "aria-activedescendant")
        assert page.get_attribute(f"#{row}", "aria-posinset") == page.get_attribute(f"#{row}", "aria-setsize")
        page.focus(".choice >> nth=1")
        page.keyboard.press("Enter")
        assert page.is_visible("#choice") and "candidate" in page.inner_text("#choice")
        page.keyboard.press("Escape")
        assert page.is_hidden("#choice")
        assert "choice" in page.evaluate(FOCUSED)[1], "the focus is where it was"


HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script>",
    "</SCRIPT ><img src=x onerror='window.pwned = 1'>",
    "<!--<script>",
    "]]><svg/onload=window.pwned=1>",
    "\"><img src='https://example.com/x' onerror=alert(1)>",
    "' onmouseover='window.pwned=1",
    "javascript:window.pwned=1//",
    "{{ 7 * 7 }}{% raw %}${7 * 7}`",
    "<style>body{display:none}</style><base href=https://example.com>",
    "a\u2028b\u2029c\x85d",
    "null\x00byte\x1b[31m\x07",
    "\u202ereversed\u202c \u2066isolate \u200e\u200f",
    "&lt;b&gt; &amp; &#60;",
    "__proto__",
    "constructor",
    "e\u0301\u0301\u0301" * 50,
    "x" * 200_000,
    "$\\frac{1}{",
]


def test_hostile_text_is_shown_as_text(browser, tmp_path):
    settings = {"model": HOSTILE[1], "verifier": HOSTILE[2], "few_shot": HOSTILE[5], "alpha": HOSTILE[9], "beta": 0.5}
    metrics = {**SWEPT, "benchmark": HOSTILE[0] + HOSTILE[-1], "git_commit": HOSTILE[4], "n": 20, "settings": settings}
    metrics["versions"] = {HOSTILE[4]: HOSTILE[2]}
    metrics["sweep"] = {**SWEPT["sweep"], "file": HOSTILE[5], "chosen": {"beta": 0.5, HOSTILE[2]: HOSTILE[4]}}
    metrics["paired"] = [{**SWEPT["paired"][0], "test": HOSTILE[0], "metric": HOSTILE[2]}]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with open(tmp_path / "predictions.jsonl", "w") as predictions, open(tmp_path / "traces.jsonl", "w") as traces:
        for text in HOSTILE:
            choice = {"at": 1, "candidates": [text, "b"], "logprobs": [-1, -2], "scores": [0, 1]}
            trace = {
                "tokens": [text, text, "<|eot_id|>"],
                "scores": [0.0, 1.0, 2.0],
                "choices": [{**choice, "chosen": 0, "changed": True}],
            }
            for mode in MODES:
                sample = {"text": text, "answer": text, "correct": False, "tokens": 3, "score": 0.1}
                line = {"id": text, "mode": mode}
                record = {**line, "question": text, "gold": text, "samples": [sample] * 2}
                predictions.write(json.dumps(record) + "\n")
                traces.write(json.dumps({**line, "traces": [trace] * (mode == "guided_greedy")}) + "\n")
    write_report(tmp_path)
    with opened(browser, tmp_path / "report.html") as page:
        elements = "() => [...document.querySelectorAll('script, img, base, iframe')].map((e) => e.tagName)"
        assert settings["model"] in page.text_content("header")
        for index, text in enumerate(HOSTILE):
            page.evaluate("index => { $('list').scrollTop = index * ROW; select(problems[index]) }", index)
            for where in (".question", ".text >> nth=0"):
                shown = page.evaluate("e => e.textContent", page.query_selector(f"#detail {where}"))
                assert text in shown
            page.hover(".choice")
            page.evaluate("document.querySelector('.choice').click()")
            assert page.is_visible("#choice")
        page.wait_for_timeout(500)  # the address is written
        assert page.evaluate("window.pwned") is None
        assert page.query_selector_all("[onerror], [onload], [onmouseover]") == []
        assert sorted(page.evaluate(elements)) == ["SCRIPT", "SCRIPT"], "only the page's own"
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_no_script_but_its_own_would_run(browser, report, tmp_path):
    """What the Content-Security-Policy is for, should a text ever get out of its place."""
    injected = "<script>window.pwned = 1</script><img src='https://example.com/x' onerror='window.pwned = 2'></body>"
    (tmp_path / "page.html").write_text(report.read_text().replace("</body>", injected))
    page = browser.new_page()
    failures, refused = [], []
    page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    page.on("console", lambda message: refused.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("window.pwned") is None
    assert failures == [("https://example.com/x", "csp")], "refused before it left"
    assert len([text for text in refused if "Content Security Policy" in text]) >= 2
    page.close()


def test_five_hundred_problems_are_usable(browser, tmp_path):
    """`bash scripts/torture.sh page` does the same with 20,000."""
    row = torture_page.judge(500, torture_page.measure(tmp_path, 500, browser))
    assert row.failed == 0, row

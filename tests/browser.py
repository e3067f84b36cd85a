"""The report page in headless Chromium, for tests: what it logs, what it requests, what axe-core says of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"
)
# Headless Chromium itself asks for nothing either: without these it looks for updates of its own.
OPTIONS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@contextmanager
def chromium() -> Iterator:
    """A playwright Browser of the Chromium on the path."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path: Path, **context) -> Iterator:
    """A playwright Page with the file. Fails at the end if the page logged an error, or requested another address.

    Args:
        context: of browser.new_context, such as color_scheme or viewport.
    """
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **context})
    page = context.new_page()
    page.set_default_timeout(120_000)
    logged, requested = [], []
    page.on("console", lambda message: logged.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("dialog", lambda dialog: (logged.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    context.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert logged == []
    assert [url for url in requested if url.partition("#")[0] != path.as_uri()] == []


def violations(page) -> list[str]:
    """What axe-core finds wrong: its rule, how bad, and the first element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}) x {len(each['nodes'])}: {each['nodes'][0]['html'][:200]}" for each in found
    ]


def heap_mib(page) -> float:
    """JavaScript's live objects, after a garbage collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"] / 2**20

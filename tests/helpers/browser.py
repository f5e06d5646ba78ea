"""Pages in a headless Chromium of the system, driven by Playwright: real keys, real widths."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

WHY_NOT = (
    "no chromium on this machine"
    if CHROMIUM is None
    else "playwright is not installed"
    if sync_playwright is None
    else None
)
"""The reason to skip what needs a browser; None where there is one."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for as many pages as are needed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page of this project, with nothing left of others.

    Args:
        browser: Of :func:`chromium`.
        path: The file; it is opened, and its script has drawn.
        width, height: Of the window, in CSS pixels.
        dark: Whether the page sees a dark colour scheme.
    """

    def __init__(
        self,
        browser: Browser,
        path: Path,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
    ) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.page: Page = self._context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url[:100]))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_function("document.documentElement.dataset.ready === 'true'")

    def js(self, expression: str) -> Any:
        """The value of an expression."""
        return self.page.evaluate(expression)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def screenshot(self, path: Path) -> None:
        """The whole page, also what is below the window."""
        self.page.screenshot(path=path, full_page=True)

    def close(self) -> None:
        self._context.close()

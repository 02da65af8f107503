"""Pictures of the page of a running server, for the documentation and for whoever changes its looks.

usage: python -m tests.e2e.page_screenshots URL DIRECTORY [KEY] — the admin port's URL and where the PNG files go; KEY is its api_key.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.e2e.browser import WIDTHS, chromium, missing


def take(browser: Any, url: str, directory: Path, *, key: str | None = None) -> list[Path]:
    """``page-{desktop,phone}-{light,dark}.png`` as they open, and the same with ``-whole`` down to the page's end."""
    directory.mkdir(parents=True, exist_ok=True)
    taken = []
    for width, viewport in WIDTHS.items():
        for scheme in ("light", "dark"):
            phone = width == "phone"
            context = browser.new_context(
                viewport=viewport, color_scheme=scheme, device_scale_factor=2 if phone else 1, is_mobile=phone, has_touch=phone
            )
            page = context.new_page()
            page.goto(url)
            if key is not None:
                page.get_by_label("admin.api_key").fill(key)
                page.get_by_role("button", name="Go on").click()
            page.wait_for_selector("#cameras img[data-version]")
            page.wait_for_selector("#plots svg")
            page.wait_for_selector("#generation_prompt_format-preview .said")
            for name, whole in ((f"page-{width}-{scheme}.png", False), (f"page-{width}-{scheme}-whole.png", True)):
                page.screenshot(path=directory / name, full_page=whole)
                taken.append(directory / name)
            context.close()
    return taken


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    with chromium() as browser:
        for path in take(browser, sys.argv[1], Path(sys.argv[2]), key=sys.argv[3] if len(sys.argv) > 3 else None):
            sys.stdout.write(f"{path}\n")

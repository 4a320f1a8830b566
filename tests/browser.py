"""Pages in headless Chromium: what a script finds in them, and what the console said."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_FLAGS = (
    *("--headless", *_QUIET, "--allow-file-access-from-files"),
    *("--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"),
)


@contextmanager
def chromium() -> Iterator[Any]:
    """The installed Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_QUIET))
        yield opened
        opened.close()


def look(page: Path, script: str, *, width: int = 1200) -> tuple[Any, list[str]]:
    """What `script`, the body of a function of the page's `document` and `window`, returns once the page is loaded in a
    frame of this width, and the lines on the console."""
    frame = page.with_name(f"{page.stem}-framed-{width}.html")
    frame.write_text(
        f"""<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<iframe id="page" src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe>
<script>
document.getElementById("page").addEventListener("load", function () {{
  setTimeout(() => {{
    const window = this.contentWindow, document = this.contentDocument;
    const found = (function () {{ {script} }})();
    this.ownerDocument.getElementById("found").textContent = JSON.stringify(found);
  }}, 1000);
}});
</script>"""
    )
    assert CHROMIUM is not None
    profile = page.with_name("profile")
    done = subprocess.run(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

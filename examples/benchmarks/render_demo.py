"""Take the picture of the demo, in a headless Chromium: examples/demo/screenshot.png.

python examples/benchmarks/render_demo.py
"""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright


FOLDER = Path(__file__).parents[1] / "demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page that is asked for, as any user of the machine.
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SWITCHES += ["--disable-sync", "--no-first-run"]
NUM_COLORS = 128


@contextmanager
def serve(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run the demo: its address and its process, whose errors go where those of this process do."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(FOLDER / "app.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0], process
                break
        else:
            raise RuntimeError(f"the demo ended with status {process.wait()} before it had an address")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browse() -> Iterator[Browser | None]:
    """A headless Chromium; None where none is installed."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        yield None
        return
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program, args=SWITCHES) as browser,
    ):
        yield browser


def take_picture(page: Page, address: str) -> bytes:
    """Return a PNG image of the page after a few clicks."""
    page.goto(address)
    page.get_by_label("Search titles").fill("harbour jazz")
    for title in ("Harbour Jazz Waltz No. 1", "Harbour Jazz March No. 1"):
        page.locator(".found", has_text=title).click()
        page.get_by_role("listitem").filter(has_text=title).wait_for()
    for number in (3, 4, 5):
        page.locator(".next", has_not_text="Jazz March").nth(1).click()
        page.get_by_text(f"Reading item {number}").wait_for()
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    stream = io.BytesIO()
    picture.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def main() -> None:
    with serve() as (address, _), browse() as browser:
        if browser is None:
            raise FileNotFoundError(f"a browser must be installed, one of {', '.join(BROWSERS)}, found none")
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        (FOLDER / "screenshot.png").write_bytes(take_picture(page, address))


if __name__ == "__main__":
    main()

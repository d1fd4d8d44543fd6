"""Makes the pictures of the documentation: python -m tools.pictures [ROOT] [SERVER]

Of a finished demo (`runs/demo`): views of its report, and the playground of its server (http://127.0.0.1:8000), which
`sae-ray serve --root ROOT` starts.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SIZE, WIDTH = {"width": 1400, "height": 1060}, 1050
"""Pixels of the window, and the width of a picture of it."""
SUBJECT = """async () => {
  const cell = (facts.cells.find(({ steering }) => steering) ?? facts.cells[0]).name;
  const index = await openIndex(cell);
  const neuron = index.neuron[bestOfClasses(index).get(facts.labels.indexOf("star"))];
  const other = facts.cells.findLast(({ name }) => name !== cell).name;
  const times = new Map();
  for (const one of index.neuron) {
    for (const image of (await knownOf(cell, one)).facets.images) times.set(image, (times.get(image) ?? 0) + 1);
  }
  const [image] = [...times.entries()].reduce((best, one) => (one[1] > best[1] ? one : best));
  return [cell, neuron, other, image];
}"""
"""The SAE that steers, its best neuron of stars, another SAE, and the image that is a top image of most neurons."""
READY = """() => {
  const seen = [...document.querySelectorAll(".thumb")].filter((one) => one.checkVisibility());
  const near = seen.filter((one) => one.getBoundingClientRect().top < innerHeight);
  return near.length > 0 && near.every((one) => one.classList.contains("white") || one.style.backgroundImage);
}"""
ASKED_ABOUT = Path("~/.cache/sae-ray/world/heldout/cross/040013.png").expanduser()


def main() -> None:
    from playwright.sync_api import sync_playwright

    root, server, *_ = [*sys.argv[1:], *["runs/demo", "http://127.0.0.1:8000"][len(sys.argv) - 1 :]]
    report = f"{Path(root).resolve().as_uri()}/report/index.html"
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(report)
        cell, neuron, other, image = page.evaluate(SUBJECT)
        views = {
            "gallery": f"neurons/{cell}",
            "neuron": f"neuron/{cell}/{neuron}",
            "compare": f"compare/{cell}/{neuron}/{other}",
            "image": f"image/{cell}/{image}",
        }
        for name, place in views.items():
            page.goto(f"{report}#/{place}")
            page.wait_for_function(READY)
            page.wait_for_load_state("networkidle")
            keep(page, name)
        page.goto(server)
        steer(page)
        keep(page, "playground")
        browser.close()


def steer(page: Page) -> None:
    """Asks in the playground about a cross that is made a star."""
    page.set_input_files("#file", ASKED_ABOUT)
    page.fill("#prompt", "Describe the image.")
    page.fill("#search", "star")
    page.press("#search", "Enter")
    page.locator("#found-title", has_text="star").wait_for()
    page.locator("#found li button").first.click()
    page.locator("#chosen li", has_text="star").wait_for()
    page.click("#send")
    page.locator("#steered", has_text="background").wait_for()
    page.wait_for_load_state("networkidle")


def keep(page: Page, name: str) -> None:
    from PIL import Image

    picture = page.screenshot(style="footer { visibility: hidden }")  # it names the root
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((WIDTH, image.height), Image.Resampling.LANCZOS)
    image.save(PICTURES / f"{name}.webp", quality=82, method=6)


if __name__ == "__main__":
    main()

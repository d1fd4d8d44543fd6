"""Makes the picture of the report in the README: python -m tools.report_picture [REPORT]

Of a finished report, by default that of the demo: the gallery of the SAE that steers.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
SIZE = (1050, 795)
SAE = "(facts.cells.find(({ steering }) => steering) ?? facts.cells[0]).name"
READY = """() => {
  const near = [...document.querySelectorAll("#gallery .card")];
  return near.length > 0 && near.every((card) => card.querySelector(".thumb"));
}"""


def main() -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    report = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/report").resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1060}, color_scheme="light")
        page.goto(f"{report.as_uri()}/index.html")
        page.goto(f"{report.as_uri()}/index.html#/neurons/{page.evaluate(SAE)}")
        page.wait_for_function(READY)
        page.wait_for_load_state("networkidle")
        picture = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(picture)).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
    image.quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()

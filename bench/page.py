"""The report in a browser, at 65,536 neurons of one SAE: python -m bench.page [REPORT]

Opens a finished report (`runs/demo/report`) from disk, as it is and with the neurons of its first SAE repeated until
there are 65,536, and measures in Chromium, without a GPU: when something is painted, when the gallery has pictures, and
how many frames a second scrolling has.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.record import Table, record
from sae_ray.report.data import PER_CHUNK
from sae_ray.report.packing import packed, write_data

NEURONS = 65_536
OPENINGS = 3
SECONDS = 4
SPEEDS = {"reading": 1_200, "flying over": 12_000}
"""Pixels a second."""
WHOLE = ("neuron", "support", "label")
"""Columns of the index that are whole numbers."""
FACTS = re.compile(r'(<script id="facts" type="application/json">)(.*?)(</script>)', re.DOTALL)

HAS_PICTURES = """() => {
  const near = [...document.querySelectorAll("#gallery .card")].filter((card) => {
    const { top, bottom } = card.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  });
  const pictured = near.filter((card) => card.querySelector(".thumb"));
  return pictured.length > 0.75 * near.length; // a neuron that fires on no image of these has none
}"""
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
SCROLL = """([speed, seconds]) => new Promise((resolve) => {
  const times = [];
  const step = (now) => {
    times.push(now);
    if (now - times[0] > 1000 * seconds) return resolve(times);
    if (times.length > 1) scrollBy(0, (speed * (now - times.at(-2))) / 1000);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


def main() -> None:
    from playwright.sync_api import sync_playwright

    report = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/report").resolve()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        large = Path(scratch) / "report"
        cell = enlarge(report, large)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        openings = [
            ["as it is", *opening(browser, report, cell)],
            [f"{NEURONS:,} neurons", *opening(browser, large, cell)],
        ]
        rows = scrolling(browser, large, cell)
        facts = {"browser": browser.version}
        browser.close()
    opened = ["report", "first paint", "gallery with its pictures"]
    scrolled = ["", "frames a second", "slowest 1 % of frames, ms", "CPU of all threads, ms a frame"]
    tables = [
        Table(title="Opening from disk, ms", columns=opened, rows=openings),
        Table(title=f"Scrolling {NEURONS:,} neurons", columns=scrolled, rows=rows),
    ]
    for row in [row for table in tables for row in (table["columns"], *table["rows"])]:
        print("  ".join(map(str, row)))
    record("page", tables, facts)


def enlarge(report: Path, large: Path) -> str:
    """Copies a report, with `NEURONS` neurons of its first SAE; returns the name of that."""
    shutil.copytree(report, large)
    page = (large / "index.html").read_text(encoding="utf-8")
    found = FACTS.search(page)
    assert found is not None
    facts = json.loads(found[2])
    cell = next(one for one in facts["cells"] if one["name"] == facts["first"])
    cell |= {"n_neurons": NEURONS, "level_ends": [NEURONS]}
    (large / "index.html").write_text(FACTS.sub(lambda at: at[1] + json.dumps(facts) + at[3], page), encoding="utf-8")

    name, data = cell["name"], large / "data"
    index = read(data, f"{name}/index")
    columns = {key: np.frombuffer(*unpacked(key, text)) for key, text in index.items()}
    n = len(columns["neuron"])
    source = np.arange(NEURONS) % n  # neurons beside one another share sprites, as in any report
    columns = {key: values[source] for key, values in columns.items()} | {"neuron": np.arange(NEURONS)}
    columns["ms"] = np.linspace(1, -0.1, NEURONS)
    write_data(
        data, f"{name}/index", {key: packed(one, "<i4" if key in WHOLE else "<f4") for key, one in columns.items()}
    )

    chunks = [read(data, f"{name}/{chunk}") for chunk in range(-(-n // PER_CHUNK))]
    whole = {key: [row for chunk in chunks for row in chunk[key]] for key in chunks[0]}
    for chunk in range(NEURONS // PER_CHUNK):
        rows = source[chunk * PER_CHUNK : (chunk + 1) * PER_CHUNK]
        full = {key: [values[row] for row in rows] for key, values in whole.items() if len(values) == n}
        write_data(data, f"{name}/{chunk}", full)
    return name


def read(data: Path, name: str) -> Any:
    """What a file of data hands to the page."""
    return json.loads((data / f"{name}.js").read_text(encoding="utf-8").removeprefix(f'report("{name}",').rstrip()[:-1])


def unpacked(key: str, text: str) -> tuple[bytes, str]:
    import base64

    return base64.b64decode(text), "<i4" if key in WHOLE else "<f4"


def opening(browser: Any, report: Path, cell: str) -> list[int]:
    """Milliseconds until something of the overview is painted, and until the gallery has pictures; medians."""
    painted, pictured = [], []
    for _ in range(OPENINGS):
        page = new_page(browser)
        page.goto(f"{report.as_uri()}/index.html")
        painted.append(page.wait_for_function(PAINTED).json_value())
        page.close()
        page = new_page(browser)
        page.goto(f"{report.as_uri()}/index.html#/neurons/{cell}")
        page.wait_for_function(HAS_PICTURES)
        pictured.append(page.evaluate("performance.now()"))
        page.close()
    return [round(median(painted)), round(median(pictured))]


def scrolling(browser: Any, report: Path, cell: str) -> list[list[Any]]:
    """Frames a second at each speed, in the order of MS and in one that reads all files."""
    rows = []
    for order, sort in (("MS", "ms"), ("frequency", "frequency")):
        for speed, pixels in SPEEDS.items():
            page = new_page(browser)
            page.goto(f"{report.as_uri()}/index.html#/neurons/{cell}?sort={sort}&support=0&label=any")
            page.wait_for_function(HAS_PICTURES)
            before = work_of(browser)
            frames = np.diff(page.evaluate(SCROLL, [pixels, SECONDS]))
            work = (work_of(browser) - before) / len(frames)
            page.wait_for_function(HAS_PICTURES)
            figures = [1000 / frames.mean(), float(np.quantile(frames, 0.99)), 1000 * work]
            name = f"by {order}, {pixels:,} pixels a second ({speed})"
            rows.append([name, *(round(one, 1) for one in figures)])
            page.close()
    return rows


def work_of(browser: Any) -> float:
    """Seconds of CPU that all processes of the browser have taken, whatever else runs on the machine."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(one["cpuTime"] for one in processes)


def new_page(browser: Any) -> Any:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: print(error, file=sys.stderr))
    return page


if __name__ == "__main__":
    main()

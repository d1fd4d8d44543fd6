"""People compare neurons in a browser, on a page opened from disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from sae_ray.jobs.cli import main

from sae_ray.concepts.judging import choose_pairs
from sae_ray.report.rating import PAGE, ratable, rating_step, write_rating
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.files import Folder
from sae_ray.study.plan import StudyPlan
from tests.machine import PATIENCE_S

N_PAIRS = 6
CELL = "layer1.all-matryoshka_batch_topk-x4-k4"
LOADED = """async (address) => {
  const image = Object.assign(new Image(), { src: address });
  await image.decode();
  return image.naturalWidth;
}"""


@pytest.fixture(scope="module")
def index(small_study: Path, plan_small_study: Callable[..., StudyPlan]) -> Path:
    """The page, as `sae-ray humans make` writes it."""
    plan = plan_small_study(small_study)
    score, _ = plan.passes(CELL)
    tables = ScoreTables(score.step.folder)
    step = rating_step(plan, score, N_PAIRS)
    pairs = choose_pairs(tables.scores.ms, ratable(tables), N_PAIRS, 0)
    write_rating(plan, score, step, pairs)
    step.finish(1.0, {"pairs": N_PAIRS})
    return Path((step.folder / PAGE).path) / "index.html"


class Rater:
    """A browser of one person, and what went wrong in it."""

    def __init__(self, browser, index: Path, phone: bool):
        size = {"width": 390, "height": 844} if phone else {"width": 1400, "height": 900}
        self.context = browser.new_context(viewport=size, has_touch=phone, is_mobile=phone)
        self.index = index
        self.phone = phone
        self.troubles: list[str] = []
        self.open()

    def open(self) -> None:
        """A new page, as after the browser was closed."""
        for page in self.context.pages:
            page.close()
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("requestfailed", lambda request: self.troubles.append(request.url))
        self.page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or self.troubles.append(request.url),
        )
        self.page.goto(self.index.as_uri())

    def begin(self, name: str) -> None:
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_label("Your name").press("Enter")

    def shown(self, number: int) -> list[int]:
        """The neurons on both sides, once the pair is there that is so far in the order."""
        self.page.locator("#position", has_text=f"Pair {number} of {N_PAIRS}").wait_for()
        self.page.locator("#left:enabled").wait_for()
        images = [self.image(side) for side in ("left", "right")]
        return [int(Path(address).stem) for address in images]

    def image(self, side: str) -> str:
        found = self.page.eval_on_selector_all(
            f"#{side} .thumb", "all => all.map((one) => getComputedStyle(one).backgroundImage)"
        )
        assert len(found) == 16
        [address] = set(found)
        return address.removeprefix('url("').removesuffix('")')

    def choose(self, number: int, side: int) -> tuple[frozenset[int], int]:
        """Chooses by tapping on a phone and by keyboard elsewhere; returns the pair and the chosen neuron."""
        shown = self.shown(number)
        if self.phone:
            self.page.locator(["#left", "#right"][side]).tap()
        else:
            self.page.keyboard.press(["ArrowLeft", "ArrowRight"][side])
        return frozenset(shown), shown[side]

    def download(self, folder: Path) -> Path:
        with self.page.expect_download() as coming:
            self.page.get_by_role("button", name="Download").click()
        path = folder / coming.value.suggested_filename
        coming.value.save_as(path)
        return path


@pytest.fixture
def rater(browser, index: Path, request: pytest.FixtureRequest) -> Iterator[Rater]:
    rater = Rater(browser, index, phone=request.param == "phone")
    yield rater
    rater.context.close()
    assert rater.troubles == []


either = pytest.mark.parametrize("rater", ["desktop", "phone"], indirect=True)


@either
def test_answers_survive_a_closed_page_and_are_downloaded(rater: Rater, index: Path, tmp_path: Path):
    rater.begin(' Ann "O", 3rd ')
    chosen = dict(rater.choose(number, number % 2) for number in (1, 2, 3))
    assert rater.page.evaluate(LOADED, rater.image("left")) == 4 * 28

    rater.open()
    before = rater.shown(4)
    rater.open()
    assert rater.shown(4) == before, "a reload changes neither the order nor the sides"

    # Back over two pairs, one of which gets another answer; then on with the first that has none.
    rater.page.get_by_role("button", name="Back").click()
    rater.shown(3)
    if rater.phone:
        rater.page.get_by_role("button", name="Back").click()
    else:
        rater.page.keyboard.press("Backspace")
    shown = rater.shown(2)
    marked = [rater.page.locator(one).get_attribute("aria-pressed") for one in ("#left", "#right")]
    assert marked == [str(neuron == chosen[frozenset(shown)]).lower() for neuron in shown]
    other = shown.index(chosen[frozenset(shown)]) ^ 1
    chosen |= dict([rater.choose(2, other)])
    chosen |= dict(rater.choose(number, 0) for number in (4, 5, 6))
    rater.page.get_by_role("heading", name="Thank you").wait_for()

    file = rater.download(tmp_path)
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    pairs = json.loads(index.read_text().split('type="application/json">')[1].split("</script>")[0])["pairs"]
    assert len(chosen) == len(rows) == N_PAIRS
    for row in rows:
        assert row["page"] == index.parent.parent.name
        assert row["rater"] == 'Ann "O", 3rd'
        sides = {int(row["left"]), int(row["right"])}
        assert sides == set(pairs[int(row["pair"])])
        assert int(row["choice"]) == chosen[frozenset(sides)]

    step = index.parents[1]
    result = CliRunner().invoke(main, ["humans", "score", "--root", str(step.parent), "--json", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["raters"], found["pairs"]) == (['Ann "O", 3rd'], N_PAIRS)
    ms = ScoreTables(Folder(step.parent) / json.loads((step / "step.json").read_text())["config"]["scores"]).scores.ms
    right = sum(ms[choice] == ms[list(pair)].max() for pair, choice in chosen.items())
    assert found["pooled"] == pytest.approx(right / N_PAIRS)


def test_raters_share_a_browser_and_see_pairs_in_their_own_order(browser, index: Path, tmp_path: Path):
    rater = Rater(browser, index, phone=False)
    orders = {}
    for name in ("Ann", "Zoë", "李"):
        rater.begin(name)
        orders[name] = [rater.choose(number, 0) for number in range(1, N_PAIRS + 1)]
        rater.download(tmp_path)
        rater.page.get_by_role("button", name="Another rater").click()
    assert len({tuple(pair for pair, _ in order) for order in orders.values()}) > 1
    lefts = {pair: {dict(order)[pair] for order in orders.values()} for pair, _ in orders["Ann"]}
    assert any(len(shown_left) == 2 for shown_left in lefts.values()), "sides are mixed"
    assert sorted(path.name.rpartition("-")[2] for path in tmp_path.iterdir()) == [
        *("Ann.csv", "Zoë.csv", "李.csv"),
    ]
    rater.begin("Ann")
    rater.page.get_by_role("heading", name="Thank you").wait_for()
    rater.context.close()
    assert rater.troubles == []


@either
def test_a_second_click_at_once_does_not_answer_the_next_pair(rater: Rater):
    rater.begin("Ann")
    rater.shown(1)
    rater.page.locator("#left").dblclick()
    rater.shown(2)
    rater.page.wait_for_timeout(300)
    rater.shown(2)


@either
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_sets_and_all_buttons_fit_on_the_screen(rater: Rater, scheme):
    rater.page.emulate_media(color_scheme=scheme)
    rater.begin("A rather long name that goes on and on, as some do")
    rater.shown(1)
    size = rater.page.viewport_size
    boxes = [one.bounding_box() for one in rater.page.locator("#rating button, #tools button").all()]
    assert len(boxes) == 5
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
        assert box["y"] + box["height"] <= size["height"]
    left, right = boxes[:2]
    assert left["width"] == right["width"] > (280 if rater.phone else 500)
    assert (left["x"] == right["x"]) == rater.phone
    assert (left["y"] == right["y"]) != rater.phone
    assert rater.page.evaluate("document.documentElement.scrollWidth") == size["width"]

    rater.page.set_viewport_size({"width": 844, "height": 390})
    last = rater.page.locator("#tools button").last.bounding_box()
    assert last["y"] + last["height"] <= 390
    assert rater.page.locator("#left").bounding_box()["width"] > 200


def test_images_that_were_not_copied_are_told_of(browser, index: Path, tmp_path: Path):
    for name in ("index.html", "report.css", "rating.css", "rating.js"):
        (tmp_path / name).write_bytes((index.parent / name).read_bytes())
    rater = Rater(browser, tmp_path / "index.html", phone=False)
    rater.begin("Ann")
    rater.page.get_by_role("alert").get_by_text("Copy the page again, with all its files").wait_for()
    rater.page.keyboard.press("ArrowLeft")
    assert rater.page.locator("#position").text_content() == f"Pair 1 of {N_PAIRS}"
    rater.context.close()

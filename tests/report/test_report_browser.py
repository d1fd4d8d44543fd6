"""The report in a browser, opened from disk: what a reader does with it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sae_ray.concepts.tables import ConceptTables
from sae_ray.report import write_report
from sae_ray.report.neurons import Neurons, read_neurons
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import summarise
from tests.accessibility import barriers
from tests.machine import PATIENCE_S, until
from tests.small_study import DEAD, LABELS, STEERED, make_report

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")

MATRYOSHKA = "layer1.all-matryoshka_batch_topk-x4-k4"
NATURAL_WIDTH = """async (address) => {
  const image = Object.assign(new Image(), { src: address });
  await image.decode();
  return image.naturalWidth;
}"""
IS_DRAWN = """(canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return pixels.data.some((value) => value > 0);
}"""


PURITIES = """(name) => {
  const labels = [...document.querySelectorAll(".label")].filter((label) => label.checkVisibility());
  return labels.map((label) => {
    const [first, last] = label.children;
    first.textContent = name;
    const outer = label.closest(".card, dd").getBoundingClientRect();
    const inner = last.getBoundingClientRect();
    return [last.textContent, inner.width > 10 && inner.left >= outer.left && inner.right <= outer.right];
  });
}"""
"""Gives all labels this name; of each the purity, and whether it is where it can be read."""


POINT = """(neuron) => {
  const one = plot.places.findIndex((place) => now.index.neuron[place] === neuron);
  const box = document.getElementById("scatter").getBoundingClientRect();
  return [box.left + plot.x[one], box.top + plot.y[one]];
}"""
"""Where in the window a neuron's point is."""


class Reader:
    """A page of the report, and what went wrong on it."""

    def __init__(self, page, address: str):
        self.page = page
        self.address = address
        self.troubles: list[str] = []
        page.on("console", lambda message: self.troubles.append(message.text))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("requestfailed", lambda request: self.troubles.append(request.url))
        own = ("file:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or self.troubles.append(request.url))

    def open(self, place: str = "", page: str = "index.html") -> None:
        self.page.goto(f"{self.address}/{page}{place}")

    def open_concepts(self, cell: str = MATRYOSHKA) -> None:
        """The page of concepts, with nothing left out but what never fired."""
        self.open(page="concepts.html")
        self.page.locator("#filters [name=cell]").select_option(cell)
        self.page.locator("#filters [name=support]").fill("0")

    def passing(self, n: int) -> None:
        """Waits until so many neurons pass the filter of the page of concepts."""
        sync_api.expect(self.page.locator("#found")).to_contain_text(f"{n:,} of ")

    def downloaded(self, button: str) -> list[dict[str, str]]:
        """The rows of the file that a button saves."""
        with self.page.expect_download() as coming:
            self.page.locator(button).click()
        with open(coming.value.path(), newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    def shown(self) -> list[int]:
        """The neurons in the gallery."""
        return [int(text) for text in self.page.locator("#gallery .card b").all_text_contents()]

    def found(self, n: int) -> None:
        """Waits until so many neurons are found."""
        sync_api.expect(self.page.locator("#found")).to_contain_text(f"{n:,} neurons of")

    def pictures(self, where: str) -> list[str]:
        """The sprites behind the pictures, once all of them are there."""
        self.page.locator(where).first.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "where => [...document.querySelectorAll(where)].every((one) => one.style.backgroundImage)", arg=where
        )
        return self.page.eval_on_selector_all(where, "all => all.map((one) => getComputedStyle(one).backgroundImage)")


@pytest.fixture(scope="module")
def plan(small_study: Path, plan_small_study: Callable[..., StudyPlan]) -> StudyPlan:
    plan = plan_small_study(small_study)
    write_report(plan)
    return plan


@pytest.fixture(scope="module")
def tables(plan: StudyPlan) -> ConceptTables:
    """What was measured of the cell."""
    return next(ConceptTables(one.step.folder) for one in plan.concepts if one.name == MATRYOSHKA)


@pytest.fixture(scope="module")
def cell(plan: StudyPlan) -> Neurons:
    return next(cell for cell in read_neurons(plan) if cell.name == MATRYOSHKA)


@pytest.fixture
def reader(browser, plan: StudyPlan) -> Iterator[Reader]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * PATIENCE_S)
    reader = Reader(page, Path((plan.root / "report").path).as_uri())
    yield reader
    page.close()
    assert reader.troubles == []


def test_the_gallery_is_filtered_and_sorted(reader: Reader, cell: Neurons, tables: ConceptTables):
    reader.open(f"#/neurons/{MATRYOSHKA}")
    ms, support, frequency = cell.columns.ms, cell.columns.n_active, cell.columns.frequency
    kept = [neuron for neuron in cell.order if support[neuron] >= 2]
    reader.found(len(kept))
    assert reader.shown() == kept[: len(reader.shown())]

    reader.page.get_by_text("More filters").click()
    middle = float(sorted(ms[kept])[len(kept) // 2])
    reader.page.get_by_label("MS at least").fill(repr(middle))
    reader.found(sum(ms[neuron].astype("f4") >= middle for neuron in kept))
    reader.page.get_by_label("MS at least").fill("")

    reader.page.get_by_label("Sort by").select_option("share of images it fires on")
    reader.page.get_by_label("Order").select_option("low to high")
    reader.page.get_by_label("Fires on at least %").fill("10")
    reader.page.get_by_label("Fires on at most %").fill("60")
    between = [neuron for neuron in kept if 0.1 <= frequency[neuron].astype("f4") <= 0.6]
    reader.found(len(between))
    shown = reader.shown()
    assert set(shown) <= set(between)
    assert [frequency[n] for n in shown] == sorted(frequency[n] for n in between)[: len(shown)]
    reader.page.get_by_role("button", name="Reset").click()

    reader.page.get_by_label("Matryoshka level").select_option("1")
    first, last = cell.level_ends[:2]
    reader.found(sum(first <= neuron < last for neuron in kept))
    assert all(first <= neuron < last for neuron in reader.shown())
    reader.page.get_by_label("Matryoshka level").select_option("")

    reader.page.get_by_label("Top images show").select_option(LABELS[2])
    label = sorted(LABELS).index(LABELS[2])
    reader.found(sum(cell.label[neuron] == label for neuron in kept))
    assert all(cell.label[neuron] == label for neuron in reader.shown())
    reader.page.get_by_role("button", name="Reset").click()

    rho = tables.neurons.rho
    middle = float(np.float32(np.median(rho[kept])))
    reader.page.get_by_label("Any other score").select_option("ρ with its concept")
    reader.page.get_by_label("at most", exact=True).fill(repr(middle))
    reader.page.get_by_label("Sort by").select_option("ρ with its concept")
    below = sorted((n for n in kept if rho[n].astype("f4") <= middle), key=lambda n: -rho[n])
    reader.found(len(below))
    assert [rho[n] for n in reader.shown()] == pytest.approx([rho[n] for n in below[: len(reader.shown())]])
    reader.page.get_by_role("button", name="Reset").click()

    wanted = [int(cell.order[-1]), int(cell.order[0])]
    reader.page.get_by_role("textbox", name="Number").fill(f"{wanted[0]}, {wanted[1]}")
    reader.found(2)
    assert set(reader.shown()) == set(wanted), "a number is found whatever the other filters say"


def test_an_address_restores_the_filter_and_the_neuron(reader: Reader, cell: Neurons):
    reader.open(f"#/neurons/{MATRYOSHKA}")
    reader.page.get_by_label("Order").select_option("low to high")
    label = sorted(LABELS).index(LABELS[0])
    reader.page.get_by_label("Top images show").select_option(LABELS[0])
    kept = [n for n in cell.order if cell.columns.n_active[n] >= 2 and cell.label[n] == label]
    worst_first = sorted(kept, key=lambda n: cell.columns.ms[n])
    reader.found(len(kept))
    assert reader.shown() == worst_first[: len(reader.shown())]
    reader.page.locator("#gallery .card").nth(1).click()
    heading = reader.page.get_by_role("heading", name=f"Neuron {worst_first[1]}", exact=True)
    heading.wait_for()
    address = reader.page.url
    reader.page.goto("about:blank")
    reader.page.goto(address)
    heading.wait_for()
    reader.page.keyboard.press("ArrowRight")
    reader.page.get_by_role("heading", name=f"Neuron {worst_first[2]}", exact=True).wait_for()
    reader.page.keyboard.press("Escape")
    reader.found(len(kept))
    assert reader.shown() == worst_first[: len(reader.shown())]
    sync_api.expect(reader.page.locator("#gallery .card").nth(2)).to_be_focused()


def test_classes_that_the_study_ignores_are_not_seen_first(
    browser, small_study: Path, plan_small_study: Callable[..., StudyPlan], cell: Neurons, tmp_path: Path
):
    shutil.copytree(small_study, tmp_path / "study", ignore=shutil.ignore_patterns("report"))
    plan = plan_small_study(tmp_path / "study", **{"concepts.ignore_labels": [LABELS[1]]})
    make_report(plan)
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * PATIENCE_S)
    reader = Reader(page, Path((plan.root / "report").path).as_uri())
    reader.open(f"#/neurons/{MATRYOSHKA}")
    kept = [neuron for neuron in cell.order if cell.columns.n_active[neuron] >= 2]
    others = [neuron for neuron in kept if cell.label[neuron] != sorted(LABELS).index(LABELS[1])]
    assert 0 < len(others) < len(kept)
    reader.found(len(others))
    assert reader.shown() == others[: len(reader.shown())]
    sync_api.expect(page.locator("#found")).to_contain_text(f"{len(kept) - len(others)} that mostly show {LABELS[1]}")
    page.get_by_role("button", name="Show them, too").click()
    reader.found(len(kept))
    assert page.url.endswith("?label=any")
    page.close()
    assert reader.troubles == []


def test_the_gallery_is_walked_by_keyboard(reader: Reader, cell: Neurons):
    """On a low window most cards are not there before the focus comes near."""
    reader.page.set_viewport_size({"width": 390, "height": 500})
    reader.open(f"#/neurons/{MATRYOSHKA}?support=0")
    reader.found(len(cell.order))
    assert len(reader.shown()) < len(cell.order)
    focused = reader.page.locator("#gallery .card:focus b")
    reader.page.locator("#gallery .card").first.focus()
    n = len(cell.order)
    for key, place in (("ArrowRight", 1), ("ArrowDown", 3), ("End", n - 1), ("ArrowUp", n - 3)):
        reader.page.keyboard.press(key)
        sync_api.expect(focused).to_have_text(str(cell.order[place]))
    item = reader.page.locator("#gallery .item:focus-within")
    sync_api.expect(item).to_have_attribute("aria-posinset", str(n - 2))
    sync_api.expect(item).to_be_in_viewport()
    reader.page.keyboard.press("Home")
    sync_api.expect(focused).to_have_text(str(cell.order[0]))
    # Cards have come and gone; those that the window has left go a moment later.
    until(lambda: (numbers := reader.shown()) == cell.order[: len(numbers)].tolist())


def test_an_image_leads_to_the_neurons_that_fire_on_it(reader: Reader, cell: Neurons):
    neuron = STEERED[0]
    reader.open(f"#/neuron/{MATRYOSHKA}/{neuron}")
    sync_api.expect(reader.page.locator("#page")).to_contain_text(f"--latent {neuron}=4x")
    reader.page.get_by_role("img", name="Top image 1:").click()
    reader.page.get_by_role("heading", name="Neurons that fire most on it").wait_for()
    image = cell.top_image[neuron][0]
    fires = [(rank, place) for place, n in enumerate(cell.order) for rank in np.flatnonzero(cell.top_image[n] == image)]
    cards = reader.page.locator("#page .card")
    sync_api.expect(cards).to_have_count(min(len(fires), 48))
    wanted = [(str(cell.order[place]), f"top image {rank + 1}") for rank, place in sorted(fires)[:48]]
    assert [tuple(card.locator(".head > *").all_text_contents()) for card in cards.all()] == wanted
    own = cards.filter(has=reader.page.locator(f"b:text-is('{neuron}')"))
    sync_api.expect(own.get_by_role("img", name="Heat map")).to_be_visible()


def test_two_neurons_and_two_saes_are_compared(reader: Reader, cell: Neurons, plan: StudyPlan):
    neuron = STEERED[0]
    reader.open(f"#/neuron/{MATRYOSHKA}/{neuron}")
    reader.page.get_by_role("link", name="compare", exact=True).click()
    other = reader.page.get_by_role("spinbutton", name="Other neuron")
    sync_api.expect(other).not_to_have_value("")
    same = [place for place, n in enumerate(cell.order) if cell.label[n] == cell.label[neuron] and n != neuron]
    best = cell.order[max(same, key=lambda place: (cell.purity[cell.order[place]], -place))]
    sync_api.expect(other).to_have_value(str(best))
    common = set(cell.top_image[neuron].tolist()) & set(cell.top_image[best].tolist()) - {-1}
    sync_api.expect(reader.page.locator("#compared")).to_contain_text(f"{len(common)} of ")
    rows = reader.page.locator("#compared .sides tr")
    values = [rows.filter(has_text="MonoSemanticity").locator("td").all_text_contents()]
    assert values == [[f"{cell.columns.ms[one]:.3f}" for one in (neuron, best)]]

    reader.page.get_by_role("spinbutton", name="One neuron").fill("")
    reader.page.keyboard.press("Tab")
    sync_api.expect(other).to_have_value("")
    reader.page.get_by_label("Other SAE").select_option("pooled-batch_topk-x2-k2")
    sync_api.expect(rows.filter(has_text="neurons")).to_have_count(1)
    by_name = {row.name: row for row in summarise(plan)}
    wanted = [f"{by_name[name].n_neurons:,}" for name in (MATRYOSHKA, "pooled-batch_topk-x2-k2")]
    sync_api.expect(rows.filter(has_text="neurons").locator("td")).to_have_text(wanted)
    sync_api.expect(reader.page.locator("#compared .versus > *")).not_to_have_count(0)


def test_a_neuron_is_opened_and_shows_its_images(reader: Reader, cell: Neurons):
    reader.open(f"#/neurons/{MATRYOSHKA}")
    card = reader.page.locator("#gallery .card").first
    card.wait_for()
    neuron = reader.shown()[0]
    assert all("sprites/" in one for one in reader.pictures("#gallery .card:first-child .thumb"))
    card.focus()
    reader.page.keyboard.press("Enter")

    heading = reader.page.get_by_role("heading", name=f"Neuron {neuron}", exact=True)
    sync_api.expect(heading).to_be_focused()
    images = [image for image in cell.top_image[neuron] if image >= 0]
    tops = reader.page.get_by_role("img", name="Top image")
    sync_api.expect(tops).to_have_count(len(images))
    first = cell.pictures.manifest["image_id"][int(images[0])].as_py()
    assert first in str(tops.first.get_attribute("aria-label"))

    sprites = {one.removeprefix('url("').removesuffix('")') for one in reader.pictures('[aria-label^="Top image"]')}
    assert sprites
    for sprite in sprites:
        assert reader.page.evaluate(NATURAL_WIDTH, sprite) == 280
    sync_api.expect(reader.page.get_by_role("img", name="Histogram")).to_be_visible()
    sync_api.expect(reader.page.get_by_role("img", name="Heat map")).to_have_count(len(images))
    assert reader.page.locator("#page canvas").first.evaluate(IS_DRAWN)

    neighbour = reader.page.locator("#page .near .card").first
    number = neighbour.locator("b").text_content()
    neighbour.click()
    sync_api.expect(reader.page.get_by_role("heading", name=f"Neuron {number}", exact=True)).to_be_visible()
    reader.page.go_back()
    sync_api.expect(heading).to_be_visible()
    reader.page.get_by_role("link", name="all neurons").click()
    sync_api.expect(reader.page.locator("#gallery")).to_be_visible()


def test_a_steered_neuron_shows_the_answers(reader: Reader):
    reader.open("#steering")
    sync_api.expect(reader.page.get_by_role("heading", name="Steering")).to_be_visible()
    reader.page.get_by_role("link", name=f"neuron {STEERED[0]}", exact=True).first.click()
    sync_api.expect(reader.page.locator("#page h3").first).to_have_text("A white image")
    sync_api.expect(reader.page.locator("#page .answer").first).to_contain_text(f"nothing → {LABELS[0]}")
    assert all("sprites/" in one for one in reader.pictures("#page .answer .thumb[data-image]"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (f"#/neuron/{MATRYOSHKA}/{DEAD}", "This neuron never fired on these images."),
        (f"#/neuron/{MATRYOSHKA}/9999", "There is no such neuron"),
        ("#/neuron/nonsense/0", "There is no such neuron"),
        ("#/neuron/pooled-batch_topk-x2-k2/1", "one vector per image"),
        ("#/neuron/layer0.cls-topk-x2-k4/1", "Out of distribution"),
        ("#/neuron/raw-layer1.all/1", "no heat maps for raw neurons"),
    ],
)
def test_what_there_is_not_is_said(reader: Reader, place: str, words: str):
    reader.open(place)
    sync_api.expect(reader.page.locator("#page")).to_contain_text(words)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["x" * 300, "a long name " * 30])
def test_the_purity_is_readable_however_long_the_label(reader: Reader, width: int, name: str):
    reader.page.set_viewport_size({"width": width, "height": 844})
    for place in ("", f"#/neuron/{MATRYOSHKA}/{STEERED[0]}"):
        reader.open(place)
        reader.page.locator(".card:visible .label").first.wait_for()
        shown = reader.page.evaluate(
            PURITIES,
            name,
        )
        assert shown
        assert all(text.endswith(" %") and inside for text, inside in shown)


def test_a_point_shows_its_neuron_and_leads_to_it(reader: Reader, cell: Neurons, tables: ConceptTables):
    reader.open_concepts()
    reader.passing(len(cell.order))
    reader.page.locator("#across").select_option("MonoSemanticity")
    reader.page.locator("#up").select_option("ρ with its concept")
    both = [n for n in cell.order if not np.isnan([cell.columns.ms[n], tables.neurons.rho[n]]).any()]
    sync_api.expect(reader.page.locator("#scatter-words")).to_contain_text(f"{len(both):,} neurons are shown")
    neuron = max(both, key=lambda one: tables.neurons.rho[one])

    reader.page.locator("#scatter").scroll_into_view_if_needed()
    x, y = reader.page.evaluate(POINT, int(neuron))
    reader.page.mouse.move(x + 1, y + 1)
    peek = reader.page.locator("#peek")
    sync_api.expect(peek).to_contain_text(f"Neuron {neuron}")
    sync_api.expect(peek).to_contain_text(f"concept: {tables.neurons.concept[neuron]}")
    shown = reader.page.locator("#peek .thumb").evaluate_all("all => all.map((one) => Number(one.dataset.image))")
    images = [image for image in cell.top_image[neuron] if image >= 0]
    captions = reader.page.evaluate("images => Promise.all(images.map(async (one) => (await caption(one)).id))", shown)
    assert captions == [cell.pictures.manifest["image_id"][int(image)].as_py() for image in images[: len(shown)]]
    assert len(shown) == min(8, len(images))
    assert all("sprites/" in one for one in reader.pictures("#peek .thumb"))

    reader.page.mouse.move(5, 5)
    sync_api.expect(peek).to_be_hidden()
    reader.page.mouse.click(x, y)
    reader.page.mouse.move(5, 5)
    sync_api.expect(peek).to_be_visible()
    reader.page.get_by_role("link", name=f"Neuron {neuron}", exact=True).click()
    sync_api.expect(reader.page.get_by_role("heading", name=f"Neuron {neuron}", exact=True)).to_be_focused()
    sync_api.expect(reader.page.locator("#page")).to_contain_text("ρ with its concept")


def test_points_can_be_reached_by_keyboard(reader: Reader, cell: Neurons):
    reader.open_concepts()
    reader.passing(len(cell.order))
    reader.page.locator("#across").select_option("MonoSemanticity")
    reader.page.locator("#up").select_option("share of images it fires on")
    ms, frequency = cell.columns.ms, cell.columns.frequency
    known = [neuron for neuron in cell.order if not np.isnan(ms[neuron]) and frequency[neuron] > 0]
    worst, next_ = sorted(known, key=lambda neuron: ms[neuron])[:2]
    reader.page.locator("#scatter").focus()
    reader.page.keyboard.press("ArrowRight")
    sync_api.expect(reader.page.locator("#pointed")).to_contain_text(f"Neuron {worst}")
    reader.page.keyboard.press("ArrowRight")
    sync_api.expect(reader.page.locator("#pointed")).to_contain_text(f"Neuron {next_}")
    reader.page.wait_for_load_state("networkidle")  # what is left behind while it loads counts as missing
    reader.page.keyboard.press("Enter")
    sync_api.expect(reader.page.get_by_role("heading", name=f"Neuron {next_}", exact=True)).to_be_visible()


def test_concepts_and_neurons_are_filtered_and_downloaded(reader: Reader, cell: Neurons, tables: ConceptTables):
    reader.open_concepts()
    neurons, order = tables.neurons, cell.order
    reader.passing(len(order))
    sync_api.expect(reader.page.locator("#matrix tbody tr")).to_have_count(len(LABELS))
    assert len(reader.downloaded("#concepts-csv")) == len(LABELS)

    reader.page.locator("#filters [name=concept]").fill(LABELS[2][:4].upper())
    mine = [neuron for neuron in order if neurons.concept[neuron] == LABELS[2]]
    assert mine
    reader.passing(len(mine))
    [row] = reader.downloaded("#concepts-csv")
    listed = tables.correlations.concept == LABELS[2]
    best = tables.correlations.neuron[listed]
    assert (row["concept"], int(row["neuron_1"])) == (LABELS[2], best[0])
    assert float(row["rho_1"]) == pytest.approx(tables.correlations.rho[listed][0], rel=1e-3)
    links = reader.page.locator("#matrix tbody a b, #matrix tbody a span:first-child")
    assert [int(text) for text in links.all_text_contents()] == best[:8].tolist()

    middle = float(np.median(neurons.rho[mine]))
    reader.page.locator("#filters [name=score]").select_option("ρ with its concept")
    reader.page.locator("#filters [name=from]").fill(repr(middle))
    kept = [neuron for neuron in mine if neurons.rho[neuron].astype("f4") >= middle]
    assert 0 < len(kept) < len(mine)
    reader.passing(len(kept))
    rows = reader.downloaded("#neurons-csv")
    assert [int(row["neuron"]) for row in rows] == kept
    for row in rows:
        neuron = int(row["neuron"])
        assert row["concept"] == LABELS[2]
        assert float(row["rho"]) == pytest.approx(neurons.rho[neuron], rel=1e-5)
        assert float(row["ms"] or "nan") == pytest.approx(cell.columns.ms[neuron], rel=1e-5, nan_ok=True)
        assert float(row["purity"]) == pytest.approx(neurons.purity[neuron], rel=1e-5)
        assert row["name_method"] == ("vlm" if neuron in STEERED else "soft_wpmi" if neurons.name[neuron] else "")
        assert float(row["soft_wpmi_score"] or "nan") == pytest.approx(
            neurons.name_score[neuron], rel=1e-5, nan_ok=True
        )

    reader.page.get_by_role("button", name="Reset").click()
    reader.open_concepts()
    reader.page.locator("#filters [name=name]").fill("nothing")
    reader.passing(1)
    [row] = reader.downloaded("#names-csv")
    assert (int(row["neuron"]), row["name"], float(row["score"])) == (STEERED[-1], "nothing", 0.5)
    sync_api.expect(reader.page.locator("#names-figures")).to_contain_text(f"4 of {len(STEERED)} names hold")
    sync_api.expect(reader.page.locator("#names-table tbody")).to_contain_text("nothing")


def test_a_missing_file_is_said_whatever_needs_it_of_concepts(browser, plan: StudyPlan, cell: Neurons, tmp_path: Path):
    shutil.copytree((plan.root / "report").path, tmp_path / "report")
    (tmp_path / "report" / "data" / MATRYOSHKA / "0.js").unlink()
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * PATIENCE_S)
    reader = Reader(page, (tmp_path / "report").as_uri())
    problem = page.locator("#problem")

    def is_said() -> None:
        sync_api.expect(problem).to_contain_text("0.js is missing; copy the report again")
        problem.evaluate("(one) => (one.textContent = '')")

    reader.open_concepts()
    reader.passing(len(cell.order))
    is_said()
    sync_api.expect(page.locator("#scatter-words")).to_contain_text("neurons are shown")
    page.locator("#method").select_option("soft_wpmi")
    is_said()
    page.locator("#more-names").click()
    is_said()
    page.locator("#scatter").focus()
    page.keyboard.press("ArrowRight")
    is_said()
    page.mouse.move(*page.evaluate(POINT, int(cell.order[0])))
    page.mouse.down()
    page.mouse.up()
    is_said()
    page.locator("#matrix a").first.hover()
    is_said()
    page.close()
    assert not [trouble for trouble in reader.troubles if "0.js is missing" in trouble], "no rejection is left over"


def test_saes_are_filtered_and_downloaded(reader: Reader, plan: StudyPlan):
    reader.open(page="concepts.html")
    reader.page.locator("summary").first.click()
    reader.page.locator("[data-rows=all-table]").fill("RAW-")
    rows = reader.downloaded("[data-table=all-table]")
    raw = [one for one in plan.concepts if one.sae is None]
    assert [row["SAE"] for row in rows] == [one.name for one in raw]
    counts = [(one.step.record() or {})["counts"]["purity_16"] for one in raw]
    assert [float(row["purity of 16 top images"]) for row in rows] == counts


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_every_view_fits_and_can_be_read(reader: Reader, width: int, scheme):
    """Nothing is wider than the window, and axe-core finds nothing that keeps people out."""
    reader.page.set_viewport_size({"width": width, "height": 844})
    reader.page.emulate_media(color_scheme=scheme)
    neuron = f"{MATRYOSHKA}/{STEERED[0]}"
    views = ("", f"#/neurons/{MATRYOSHKA}", f"#/neuron/{neuron}", f"#/image/{MATRYOSHKA}/0", f"#/compare/{neuron}")
    for place in views:
        reader.open(place)
        reader.page.locator(".thumb:visible").first.wait_for()
        reader.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert reader.page.evaluate("document.documentElement.scrollWidth") == width, place
        if width == 1400:
            assert barriers(reader.page, contrast_only=scheme == "dark") == [], place
    paper = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, paper[4:-1].split(","))) > 128) == (scheme == "light")
    reader.page.locator("#theme").click()
    assert reader.page.evaluate("getComputedStyle(document.body).backgroundColor") != paper


@pytest.mark.parametrize("width", [390, 1400])
def test_concepts_are_no_wider_than_the_window(reader: Reader, width: int):
    reader.page.set_viewport_size({"width": width, "height": 844})
    reader.open_concepts()
    reader.page.locator("#names-table .thumb").first.wait_for()
    reader.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert reader.page.evaluate("document.documentElement.scrollWidth") == width
    if width == 1400:
        assert barriers(reader.page) == []
        reader.page.locator("#theme").click()
        assert barriers(reader.page, contrast_only=True) == []

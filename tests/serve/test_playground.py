"""The playground in a browser."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.accessibility import barriers
from tests.machine import PATIENCE_S

from .conftest import KEY, STEERS, data_url, stored


@pytest.fixture
def page(browser, server, request):
    """The playground, where the key was given; nothing but this server is asked for anything."""
    width, height = getattr(request, "param", (1400, 1000))
    context = browser.new_context(viewport={"width": width, "height": height})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda one: one.url.startswith((server.url, "data:", "blob:")) or problems.append(one.url))
    page.goto(server.url)
    page.locator("#problem", has_text="API key").wait_for()
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.locator("#found li").first.wait_for()
    yield page
    assert problems == []
    context.close()


@pytest.mark.parametrize("page", [(1400, 1000), (390, 844)], ids=["desktop", "phone"], indirect=True)
def test_a_feature_is_searched_for_and_steers(page):
    page.select_option("#sae", STEERS)
    page.fill("#search", "star")
    page.press("#search", "Enter")
    page.locator("#found-title", has_text="star").wait_for()
    page.locator("#found li button").first.press("Enter")
    page.locator("#chosen li", has_text="star").wait_for()
    page.press("#prompt", "Enter")
    page.locator("#steered", has_text="star").wait_for()
    page.locator("#default", has_text="nothing").wait_for()
    assert page.locator("#problem").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    slider = page.locator("#chosen input[type=range]")
    slider.fill("0")
    page.click("#send")
    page.locator("#steered", has_text="star").wait_for(state="detached")
    page.locator("#steered", has_text="nothing").wait_for()

    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.locator("#chosen li", has_text="star").wait_for()
    assert page.locator("#chosen input[type=range]").input_value() == "0"


def test_a_feature_is_pushed_by_a_share_of_the_token(page):
    page.select_option("#sae", STEERS)
    page.fill("#search", "star")
    page.press("#search", "Enter")
    page.locator("#found-title", has_text="star").wait_for()
    page.locator("#found li button").first.press("Enter")
    page.select_option("#chosen select", "balanced")
    steering = asked(page)
    assert steering["error"] == page.locator("#error").input_value() == "keep"
    [edit] = steering["features"]
    assert edit == {"index": edit["index"], "strength": 1, "mode": "balanced", "unit": "absolute"}
    page.locator("#chosen output", has_text="1 × token").wait_for()
    page.locator("#chosen input[type=range]").fill("2")
    page.click("#send")
    page.locator("#steered", has_text="star").wait_for()
    page.locator("#default", has_text="nothing").wait_for()
    assert page.locator("#problem").is_hidden()


def test_more_features_are_shown_and_nothing_keeps_people_out(page):
    """A newcomer sees shapes first, though blank images have the highest scores; axe-core looks at both themes."""
    assert "blank" not in page.locator("#found .name").first.text_content()
    names = page.locator("#found .name")
    assert names.count() == 12
    page.click("#more")
    page.locator("#found li").nth(12).wait_for()
    assert page.locator("#found li").nth(12).locator("button").evaluate("one => one === document.activeElement")
    facts = page.locator("#found .facts-line").all_text_contents()
    assert len(facts) == len(set(facts)) > 12
    page.locator("#found button").first.click()
    assert barriers(page) == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    assert barriers(page, contrast_only=True) == []


def test_the_image_itself_has_features(page):
    page.click("#inspect")
    page.locator("#found-title", has_text="Active on this image").wait_for()
    assert page.locator("#found .seen canvas").count() == page.locator("#found li").count()
    page.locator("#found button", has_text="Where?").first.click()
    page.locator("#heat").wait_for(state="visible")


PIXELS = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


def pixels(page) -> np.ndarray:
    """RGB of the picture, as the browser shows it."""
    page.wait_for_function("document.getElementById('picture').complete")
    height, width, values = page.locator("#picture").evaluate(PIXELS)
    return np.array(values).reshape(height, width, 4)[..., :3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_heat_map_lies_on_the_picture(page, http, orientation):
    """The browser shows a photo upright, and under a heat map just what the encoder sees of it."""
    upright = Image.new("RGB", (84, 56), "white")
    upright.paste("black", (45, 5, 65, 25))
    photo = stored(upright, orientation, "JPEG")
    page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo})
    page.wait_for_function("document.getElementById('picture').src.startsWith('data:image/jpeg')")
    assert np.abs(pixels(page) - np.asarray(upright, int)).mean() < 6
    page.click("#inspect")
    page.locator("#found-title", has_text="Active on this image").wait_for()
    page.locator("#found button", has_text="Where?").first.click()
    page.locator("#heat").wait_for(state="visible")
    sae = page.locator("#sae").input_value()
    answer = http.post("/v1/features/inspect", json={"image": data_url(photo), "sae": sae, "limit": 12}).json()
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"].split(",")[1]))), int)
    assert np.array_equal(pixels(page), seen)
    assert np.abs(seen - np.asarray(upright.crop((14, 0, 70, 56)), int)).mean() < 6
    places = [page.locator(name).bounding_box() for name in ("#picture", "#heat")]
    assert places[0] == places[1]
    assert page.locator("#heat").evaluate("one => [one.height, one.width]") == [4, 4]


def asked(page) -> dict:
    """The steering that would be asked for."""
    return page.evaluate("request(state.image).steering")


def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place on the picture to another, in fractions of it."""
    frame = page.locator("#region").bounding_box()
    width, height = page.locator("#picture").evaluate("one => [one.naturalWidth, one.naturalHeight]")
    scale = min(frame["width"] / width, frame["height"] / height)
    at = [
        (
            frame["x"] + (frame["width"] - width * scale) / 2 + x * width * scale,
            frame["y"] + (frame["height"] - height * scale) / 2 + y * height * scale,
        )
        for x, y in (start, end)
    ]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()


def test_a_rectangle_is_drawn_and_edits_a_part(page):
    """In a wide picture, whose middle the model sees; then by its numbers, and back by the link."""
    page.select_option("#sae", STEERS)
    page.fill("#search", "star")
    page.press("#search", "Enter")
    page.locator("#found-title", has_text="star").wait_for()
    page.locator("#found li button").first.press("Enter")
    file = {"name": "wide.png", "mimeType": "image/png", "buffer": png(Image.new("RGB", (84, 56), "white"))}
    page.set_input_files("#file", file)
    page.wait_for_function("document.getElementById('picture').naturalWidth === 84")
    page.locator("#everywhere", has_text="The whole image.").wait_for()
    assert "region" not in asked(page)

    page.locator("#region").scroll_into_view_if_needed()
    drag(page, (0.75, 0.9), (0.25, 0.1))
    page.locator("#rectangles li").wait_for()
    [drawn] = asked(page)["region"]["rectangles"]
    assert drawn == pytest.approx([0.25, 0.1, 0.75, 0.9], abs=0.011)
    tinted = page.locator("#region").evaluate(
        "one => one.getContext('2d').getImageData(one.width / 2, one.height / 2, 1, 1).data[3]"
    )
    assert tinted > 0
    page.fill("#prompt", "Describe the image.")
    page.click("#send")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#default", has_text="nothing").wait_for()

    left = page.get_by_label("Left of rectangle 1")
    left.fill("0")
    page.get_by_label("Right of rectangle 1").fill("10")
    assert asked(page)["region"]["rectangles"] == [[0, drawn[1], 0.1, drawn[3]]]
    page.click("#send")
    page.locator("#problem", has_text="crops images").wait_for()
    left.fill("20")
    assert asked(page)["region"]["rectangles"][0][0] == 0, "what is no rectangle is not taken"

    page.get_by_role("button", name="Add a rectangle").press("Enter")
    assert asked(page)["region"]["rectangles"][1] == [0.25, 0.25, 0.75, 0.75]
    page.get_by_role("button", name="Remove rectangle 1").press("Enter")
    index = asked(page)["features"][0]["index"]
    page.select_option("#when", str(index))
    page.get_by_label("Above").fill("0.25")
    assert asked(page)["when"] == {"index": index, "above": 0.25, "unit": "max"}

    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.locator("#rectangles li").wait_for()
    steering = asked(page)
    assert steering["region"] == {"rectangles": [[0.25, 0.25, 0.75, 0.75]]}
    assert steering["when"] == {"index": index, "above": 0.25, "unit": "max"}
    assert page.locator("#when").input_value() == str(index)
    page.click("#clear")
    assert "region" not in asked(page)


def test_a_mask_is_painted(page):
    page.locator("#region").scroll_into_view_if_needed()
    page.get_by_role("button", name="Paint").press("Enter")
    drag(page, (0.2, 0.4), (0.8, 0.4))
    page.locator("#everywhere", has_text="what is painted").wait_for()
    url = asked(page)["region"]["mask"]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getchannel("A")) > 127
    rows, columns = (np.flatnonzero(mask.any(axis)) / mask.shape[1 - axis] for axis in (1, 0))
    assert [rows[0], rows[-1]] == pytest.approx([0.3, 0.5], abs=0.03)
    assert [columns[0], columns[-1]] == pytest.approx([0.1, 0.9], abs=0.03)
    page.locator("#found li button").first.click()
    page.click("#send")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#default", has_text="nothing").wait_for()
    assert page.locator("#problem").is_hidden()
    page.click("#blank")
    assert "region" not in asked(page), "what is painted belongs to the picture"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_request_is_copied(page):
    page.locator("#found li button").first.click()
    page.click("#curl")
    page.locator("#copied", has_text="Copied").wait_for()
    curl = page.evaluate("navigator.clipboard.readText()")
    assert curl.startswith("curl -N http://127.0.0.1:")
    assert "$SAE_RAY_API_KEY" in curl
    assert KEY not in curl
    page.click("#python")
    python = page.evaluate("navigator.clipboard.readText()")
    compile(python, "copied", "exec")
    assert "steering" in python

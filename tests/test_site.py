"""The documentation as GitHub shows it and as `make docs` builds it.

MkDocs itself checks the links of the site; here are those of the repository, where no site is built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sae_ray
from tools.site import CODE, links, loaded_from_elsewhere, notebook_page, repository_path, rewritten, slug

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb")])


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return notebook_page(json.loads(text)) if page.suffix == ".ipynb" else text


def anchors(text: str) -> Iterator[str]:
    headings = CODE.sub(lambda code: code[0].strip("`") if "\n" not in code[0] else "", text)
    for heading in re.findall(r"^#+ (.*)$", headings, re.MULTILINE):
        yield slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
    yield from re.findall(r'<a id="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text, name, dead = text_of(page), page.relative_to(ROOT).as_posix(), []
    for target in links(text):
        path, anchor = repository_path(name, target), target.partition("#")[2]
        if re.match(r"[a-z]+:", target):
            continue
        there = page if path is None else ROOT / path
        if not there.exists() or (anchor and anchor not in anchors(text_of(there))):
            dead.append(target)
    assert dead == []


def test_pictures_are_small_shown_and_described():
    shown = {}
    for page in (page for page in PAGES if page.suffix == ".md"):
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", CODE.sub("", text_of(page))):
            shown[(page.parent / target).resolve()] = words
    assert all(len(words.split()) >= 5 for words in shown.values()), shown
    assert {path for path in shown if path.parent.name == "pictures"} == set((ROOT / "docs" / "pictures").iterdir())
    assert [path.name for path in shown if path.stat().st_size > 250_000] == []


def test_the_page_of_the_python_api_has_every_name():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    public = re.findall(r" as (\w+)$", Path(sae_ray.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"^::: sae_ray\.(\w+)$", page, re.MULTILINE)) == sorted(public)


def test_links_of_pages_lead_to_pages_of_the_site():
    text = "[a](../studies/demo.toml), [b](steering.md#where-to-steer), `[c](d.md)`, [`e`](examples/f.ipynb)\n"
    site = "[a](source/studies/demo.toml.md), [b](steering.md#where-to-steer), `[c](d.md)`, [`e`](examples/f.md)\n"
    assert rewritten("docs/api.md", text) == site
    assert rewritten("README.md", "[a](docs/api.md) ![b](docs/b.png)") == "[a](api.md) ![b](b.png)"
    assert rewritten("docs/examples/a.ipynb", "[a](../../README.md#b) [c](#d)") == "[a](../index.md#b) [c](#d)"


def test_what_a_page_would_load_from_elsewhere_is_seen(tmp_path: Path):
    (tmp_path / "good.html").write_text(
        '<link rel="canonical" href="https://x.org/"><a href="https://x.org/">x</a><img src="a.png"><script src="b.js">'
    )
    (tmp_path / "good.css").write_text("a { background: url(b.png) } /* https://x.org */")
    assert loaded_from_elsewhere(tmp_path) == []
    (tmp_path / "one.html").write_text('<link rel="stylesheet" href="//x.org/a.css"><img srcset="https://x.org/b 2x">')
    (tmp_path / "three.html").write_text('<pre class="mermaid"></pre><script src="https://x.org/c.js"></script>')
    (tmp_path / "two.css").write_text('@import "https://x.org/d"; a { src: url("https://x.org/e") }')
    found = [one.rpartition("/")[2] for one in loaded_from_elsewhere(tmp_path)]
    assert found == ["a.css", "b 2x", "three.html: mermaid", "c.js", "d", "e"]

"""What MkDocs does not know of this repository; a hook of mkdocs.yml.

Pages of docs/ link to each other and to files of the repository, as GitHub shows them. The site gets the README as its
first page, notebooks as pages, and a page for every file or folder outside docs/ that is linked. It loads nothing from
elsewhere, which is checked.
"""

from __future__ import annotations

import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
TOP_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's top that are pages of the site."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))|(<img [^>]*src=\")([^\"]+)(\")")
CODE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json", ".sbatch": "bash", ".sh": "bash"}


def slug(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a heading, of its text without markup."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def links(markdown: str) -> list[str]:
    """The targets of all links and pictures outside code."""
    return [match[2] or match[5] for match in LINK.finditer(CODE.sub(lambda code: " " * len(code[0]), markdown))]


def on_config(config: MkDocsConfig) -> None:
    config.mdx_configs["toc"]["slugify"] = slug


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    pages = {source: (REPOSITORY / source).read_text(encoding="utf-8") for source in TOP_PAGES}
    for file in list(files):
        source = f"docs/{file.src_uri}"
        if source.endswith(".md"):
            pages[source] = file.content_string
        elif source.endswith(".ipynb"):
            pages[source] = notebook_page(json.loads(file.content_string))
            files.remove(file)
    shown = {repository_path(source, target) for source, text in pages.items() for target in links(text)}
    for path in sorted(shown - {None, *pages}):
        if not path.startswith("docs/"):
            pages[path] = source_page(path)
    for source, text in pages.items():
        if not source.startswith("docs/") or source.endswith(".ipynb"):
            files.append(File.generated(config, site_path(source), content=rewritten(source, text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return markdown if page.file.generated_by else rewritten(f"docs/{page.file.src_uri}", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    from mkdocs.exceptions import PluginError

    if found := loaded_from_elsewhere(Path(config.site_dir)):
        raise PluginError("The site would load from elsewhere:\n" + "\n".join(found))


def repository_path(source: str, target: str) -> str | None:
    """Where a link of a file leads, seen from the repository's top; None if to the file itself or to the web."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def site_path(path: str) -> str:
    """The page of the site that shows a file of the repository."""
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/").removesuffix(".ipynb") + (".md" if path.endswith(".ipynb") else "")
    return f"source/{path}.md"


def rewritten(source: str, markdown: str) -> str:
    """The text of a page, with its links as the site has them."""
    here = posixpath.dirname(site_path(source))

    def moved(match: re.Match) -> str:
        before, target, after = (part for part in match.groups() if part is not None)
        path = repository_path(source, target)
        if path is None:
            return match[0]
        mark, anchor = target.partition("#")[1:]
        return before + posixpath.relpath(site_path(path), here or ".") + mark + anchor + after

    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(moved, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(moved, markdown[end:])])


def source_page(path: str) -> str:
    """A file of the repository, or the files of one of its folders, as they are."""
    place = REPOSITORY / path
    files = sorted(one for one in place.iterdir() if one.is_file()) if place.is_dir() else [place]
    parts = [f"# `{path}`"]
    for file in files:
        if len(files) > 1:
            parts.append(f"## `{file.name}`")
        language = LANGUAGES.get(file.suffix, "text")
        parts.append(f"~~~~~~{language}\n{file.read_text(encoding='utf-8').rstrip()}\n~~~~~~")
    return "\n\n".join(parts) + "\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook, and what they put out."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    for kind in ("image/jpeg", "image/png"):
        if kind in data:
            return f'<img alt="" src="data:{kind};base64,{"".join(data[kind]).strip()}">'
    if "text/html" in data:
        return "<div>" + re.sub(r"\n\s*", " ", "".join(data["text/html"])) + "</div>"
    text = "".join(data.get("text/plain", output.get("text", [])))
    return f"```text\n{text.rstrip()}\n```" if output.get("name") != "stderr" and text.strip() else ""


class _Loads(HTMLParser):
    """Addresses that a browser would fetch of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = {"link": ("href",)}.get(tag, ("src", "srcset", "data", "poster"))
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev", "edit"):
            return
        # Diagrams would be drawn by a script that the theme fetches.
        self.found += ["mermaid"] if "mermaid" in (given.get("class") or "").split() else []
        self.found += [address for name in names if (address := given.get(name) or "")]


def loaded_from_elsewhere(site: Path) -> list[str]:
    """`file: address` of everything that pages or style sheets of the site load from another host."""
    found = []
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            parser = _Loads()
            parser.feed(file.read_text(encoding="utf-8"))
            loads = parser.found
        elif file.suffix == ".css":
            text = file.read_text(encoding="utf-8")
            loads = re.findall(r"(?:url\(|@import\s*)[\"']?([^\"')\s]+)", text)
        else:
            continue
        found += [
            f"{file.relative_to(site)}: {address}"
            for address in loads
            if address == "mermaid" or re.match(r"(?:https?:)?//", address)
        ]
    return found

"""`python -m tools.http_reference` writes docs/http.md: the HTTP API, as its OpenAPI document describes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "http.md"
HEAD = """# The HTTP reference

The paths of `sae-ray serve`, and the data that they take and give. A running server has the same at `/docs`, to try
out, and at `/openapi.json`, for generators of clients. [api.md](api.md) is the introduction; it also lists the fields
of OpenAI's API that have no effect, or of which only some values pass, which are left out here. Failures have the
status 4XX or 5XX and an [ErrorBody](#errorbody).

This page is written by `python -m tools.http_reference`.
"""
OF_OTHERS = ("Has no effect.", "Others are refused")
"""How descriptions of fields begin that api.md lists."""


def page(api: dict[str, Any]) -> str:
    """The page of an API, given as OpenAPI describes it."""
    parts = [HEAD, "## Paths"]
    for path, methods in api["paths"].items():
        for method, one in methods.items():
            parts += [f"### `{method.upper()} {path}`", one.get("description", ""), *_operation(one)]
    parts.append("## Data")
    for name, schema in sorted(api["components"]["schemas"].items()):
        if name not in ("HTTPValidationError", "ValidationError"):
            parts += [f"### {name}", schema.get("description", ""), _fields(schema)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _operation(one: dict[str, Any]) -> Iterator[str]:
    if parameters := one.get("parameters"):
        rows = [(it["name"], it["in"], it["schema"], it.get("description", "")) for it in parameters]
        yield _table(("parameter", "in", "type", "default", ""), [_row(name, place, *of) for name, place, *of in rows])
    if body := one.get("requestBody"):
        yield f"Takes {_contents(body['content'])}."
    yield f"Gives {_contents(one['responses']['200']['content'])}."


def _contents(content: dict[str, Any]) -> str:
    kinds = [
        _type(media["schema"]) if kind == "application/json" else f"`{kind}`"
        for kind, media in content.items()
        if kind != "application/json" or media["schema"]
    ]
    return " or ".join(kinds) or "JSON"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        _row(f"{name}` (required)" if name in required else f"{name}`", None, of, of.get("description", ""))
        for name, of in schema.get("properties", {}).items()
        if not of.get("description", "").startswith(OF_OTHERS)
    ]
    return _table(("field", "type", "default", ""), rows) if rows else ""


def _row(name: str, place: str | None, schema: dict[str, Any], description: str) -> tuple[str, ...]:
    default = schema.get("default")
    shown = "" if default is None else f"`{json.dumps(default)}`"
    first = (f"`{name}",) if place is None else (f"`{name}`", place)
    return (*first, _type(schema), shown, description.replace("\n", " "))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _type(schema: dict[str, Any]) -> str:
    """In words, with a link to each of our own."""
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(one) for one in several if one.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{json.dumps(value)}`" for value in values if value is not None)
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low, high = (
        next((schema[name] for name in names if name in schema), None)
        for names in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    bounds = {(True, True): f", {low} to {high}", (True, False): f", from {low}", (False, True): f", up to {high}"}
    return kind + bounds.get((low is not None, high is not None), "")


def main() -> None:
    from sae_ray.serve.api import create_api
    from sae_ray.serve.config import ServeConfig
    from sae_ray.serve.service import Service

    from sae_ray.world.write import MODELS

    config = ServeConfig(root="none", llava=str(MODELS / "llava"), without_key=True)
    PAGE.write_text(page(create_api(Service(config, None, None)).openapi()), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The dashboard for Grafana, and the page about it, show the metrics that the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from sae_ray.jobs.metrics import CELL, FAILURES, STAGE
from sae_ray.serve.limiter import Limiter
from sae_ray.serve.metrics import Metrics

ROOT = Path(__file__).parents[1]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana" / "sae-ray.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]


def exported_names() -> set[str]:
    """As Prometheus reads them from the agents of Ray's nodes."""
    return {f"ray_{name}" for name in (*STAGE, *CELL, f"{FAILURES}_total")}


def served_names() -> set[str]:
    """As Prometheus reads them from a server that has answered a request."""
    metrics = Metrics(Limiter(1, 1))
    metrics.request("/v1/steer", 200, 0.1)
    metrics.tokens(1, 1)
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name for family in families for sample in family.samples}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?sae_ray_\w+", text))


@pytest.mark.parametrize("query", [*QUERIES, *VARIABLES])
def test_every_query_is_of_metrics_that_exist(query: str):
    assert names_in(query)
    assert names_in(query) <= exported_names() | served_names()
    assert all(query.count(opening) == query.count(closing) for opening, closing in ("()", "{}", "[]"))


def test_every_metric_is_shown():
    shown = set().union(*map(names_in, QUERIES))
    assert exported_names() <= shown
    assert {name for name in served_names() if not name.endswith(("_created", "_sum", "_count"))} <= shown


def lost(given: Any, read: Any, where: str = "") -> list[str]:
    """What Grafana's own types do not know of a dashboard that they have read."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [place for key in given for place in lost(given[key], read.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [place for n, pair in enumerate(zip(given, read, strict=True)) for place in lost(*pair, f"{where}[{n}]")]
    return [] if given == read else [where]


def through_grafana(dashboard: dict[str, Any]) -> dict[str, Any]:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_grafana_knows_everything_in_it():
    assert lost(DASHBOARD, through_grafana(DASHBOARD)) == []
    [*others, last] = DASHBOARD["panels"]
    misspelt = DASHBOARD | {"panels": [*others, last | {"gridpos": last["gridPos"]}]}
    assert lost(misspelt, through_grafana(misspelt)) == [f".panels[{len(others)}].gridpos"]


def test_panels_have_a_place_a_number_and_the_chosen_source():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert any(one["name"] == "datasource" and one["type"] == "datasource" for one in DASHBOARD["templating"]["list"])
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_the_page_names_every_metric():
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    ours = {name for name in served_names() if not name.endswith(("_created", "_bucket", "_sum", "_count"))}
    assert exported_names() | ours <= names_in(page)
    known = exported_names() | served_names()
    assert all(name in known or f"{name}_count" in known for name in names_in(page))

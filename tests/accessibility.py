"""What keeps people out of a page, as the real axe-core finds it."""

from __future__ import annotations

from typing import Any


def barriers(page: Any) -> list[str]:
    """The serious and critical violations on a page of Playwright: the rule, and where."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in violations
        if one["impact"] in ("serious", "critical")
    ]

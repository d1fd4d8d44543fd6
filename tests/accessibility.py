"""What keeps people out of a page, as the real axe-core finds it."""

from __future__ import annotations

from typing import Any


def barriers(page: Any, contrast_only: bool = False) -> list[str]:
    """The serious and critical violations on a page of Playwright: the rule, and where.

    `contrast_only` is for a page whose other colours have been checked already.
    """
    from axe_playwright_python.sync_playwright import Axe

    # Its own requests for style sheets fail on a page from disk; it needs them for one rule, about turned screens.
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if contrast_only:
        options["runOnly"] = ["color-contrast"]
    violations = Axe().run(page, options=options).response["violations"]
    return [
        f"{one['id']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in violations
        if one["impact"] in ("serious", "critical")
    ]

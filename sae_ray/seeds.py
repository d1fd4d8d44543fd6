"""Seeds: a study has one seed, from which all others are derived by name."""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """A seed for `name`, derived from the study's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")

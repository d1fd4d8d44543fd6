"""Seeds: a study has one, from which all others follow by name."""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """The seed of something named, from the study's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")

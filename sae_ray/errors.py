"""Errors that a user can fix. The message names the field, the value and the remedy; no traceback is shown."""


class SaeRayError(Exception):
    """The work failed: bad data, a missing folder, a full disk. The command line exits with 1."""

    exit_code = 1


class UsageError(SaeRayError):
    """Invalid usage or configuration: an unknown key, a layer out of range, k above d_sae. Exits with 2."""

    exit_code = 2


def check(holds: bool, field: str, value: object, remedy: str) -> None:
    """Raises UsageError with the field, its value and the remedy, unless it holds."""
    if not holds:
        raise UsageError(f"{field} = {value!r}: {remedy}")

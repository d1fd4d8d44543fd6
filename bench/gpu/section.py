"""One section of the benchmark, in this process: `python -m bench.gpu.section NAME [--small]`.

A section is a module with `tables(sizes, device)`, which yields a table whenever it has a new one, or an earlier one
with another row.
"""

from __future__ import annotations

import importlib
import sys

import torch

from bench.gpu.sizes import FULL, SMALL
from bench.record import Table, record


def main() -> None:
    name, *rest = sys.argv[1:]
    small = rest == ["--small"]
    if not small and not torch.cuda.is_available():
        sys.exit("there is no GPU here; try --small")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    measured: dict[str, Table] = {}
    try:
        for table in importlib.import_module(f"bench.gpu.{name}").tables(SMALL if small else FULL, device):
            measured[table["title"]] = table
            if not small:
                record(f"gpu_{name}", list(measured.values()), facts)
    finally:
        for table in measured.values():
            print(table["title"], table["columns"], *table["rows"], sep="\n", flush=True)


if __name__ == "__main__":
    main()

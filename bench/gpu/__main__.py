"""What a GPU makes of the product at the sizes of the paper, with random weights: `python -m bench.gpu [SECTION ...]`.

Each section runs in a process of its own and for a bounded time, so that none can spoil another, and writes
`bench/results/gpu_<section>.json` whenever a table has grown. It needs torch with CUDA, transformers, safetensors,
pyarrow, numpy and annotated-types; neither Ray nor open_clip nor a network. A peer is measured where its package is
installed. `--small` runs the same code at tiny sizes, on a CPU too, and writes nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

SECTIONS = {
    "floors": 40,
    "training": 150,
    "steps": 60,
    "parts": 60,
    "extraction": 40,
    "decoding": 45,
    "compiled": 45,
    "scoring": 60,
    "serving": 90,
}
"""Seconds that each may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all of it runs; writes nothing")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    failed = []
    for name in options.sections or SECTIONS:
        began = time.monotonic()
        command = [sys.executable, "-m", "bench.gpu.section", name, *(["--small"] if options.small else [])]
        try:
            code = subprocess.run(command, timeout=SECTIONS[name]).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {SECTIONS[name]} s; the tables have what was measured until then"
        print(f"{name}: {time.monotonic() - began:.0f} s, {code or 'done'}", flush=True)
        if code:
            failed.append(name)
    if failed:
        sys.exit(f"not complete: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""One contestant in a process of its own: `python -m bench.contestants.worker <name> <folder>` in its environment.

The folder holds `data.npy` and `heldout.npy` [rows, d_in], the initial `W_enc_t.npy` and `W_dec.npy` [d_sae, d_in] and
`b_dec.npy` [d_in] (`b_enc` is 0), and `settings.json`. Commands come as JSON lines on stdin: `{"do": "step", "n": 3}`
answers with the milliseconds of each step, `{"do": "score"}` with the fidelity of the contestant's own inference on the
held-out data. A contestant is a class with `step`, `reconstruct` and `mark_dead` (see `ours.py`); what a floor lacks of
these it is never asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

PARTS = ("data", "heldout", "W_enc_t", "W_dec", "b_dec")


class Settings(NamedTuple):
    """What all contestants are given."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    """Training steps of the whole run."""
    learning_rate: float
    threshold_beta: float
    """Decay of the moving average that gives the inference threshold."""
    auxk: bool
    """Whether dead latents are revived; half of the latents are then counted as dead before every step."""
    threads: int
    device: str = "cpu"
    dtype: str = "float32"
    """Of the encoder's product, where the contestant lets one choose."""


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no answer
        settings = Settings(**json.loads((folder / "settings.json").read_text()))
        torch.set_num_threads(settings.threads)
        data, heldout, *start = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in PARTS)
        module, _, variant = name.partition(".")
        contestant = getattr(importlib.import_module(f"bench.contestants.{module}"), variant)(settings, *start)
        done = 0
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "step":
                answer = []
                for _ in range(command["n"]):
                    start = done * settings.batch % len(data)
                    batch = data[start : start + settings.batch]
                    if settings.auxk:
                        contestant.mark_dead(settings.d_sae // 2)
                    started = time.perf_counter()
                    contestant.step(batch)
                    answer.append(1000 * (time.perf_counter() - started))
                    done += 1
            else:
                with torch.no_grad():
                    x_hat, n_active = contestant.reconstruct(heldout)
                error = (heldout - x_hat).double().square().sum()
                variance = (heldout - heldout.mean(0)).double().square().sum()
                answer = {"r2": 1 - (error / variance).item(), "l0": n_active / len(heldout)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

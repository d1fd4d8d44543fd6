"""A virtual environment per peer, made from pip once, so that no peer's requirements touch another's or ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".envs"
# torch is installed first: a looser range takes the newest CUDA builds, several GB.
TORCH = "torch==2.13.0"
PEERS = {
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sae_lens": "sae-lens==6.54.12",
}


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    finished = folder / ".finished"
    if not finished.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for requirement in (TORCH, PEERS[peer]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        finished.touch()
    return python


def python() -> dict[str, Path]:
    """The interpreters of all peers."""
    return {peer: python_of(peer) for peer in PEERS}


if __name__ == "__main__":
    python()

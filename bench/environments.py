"""A virtual environment per peer, made from pip once, so that no peer's requirements touch another's or ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".envs"
# torch is installed first: a looser range takes the newest CUDA builds, several GB.
TORCH = "torch==2.13.0"
PEERS = {
    "dictionary_learning": ("dictionary-learning==0.1.0",),
    "sae_lens": ("sae-lens==6.54.12",),
    # What the code of arXiv 2504.02821 asks for.
    "reference": ("transformers==4.46.3", "pillow==11.0.0"),
}


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    finished = folder / ".finished"
    if not finished.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for requirements in ((TORCH,), PEERS[peer]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        finished.touch()
    return python


if __name__ == "__main__":
    for name in PEERS:
        python_of(name)

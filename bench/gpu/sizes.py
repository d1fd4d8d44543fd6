"""The sizes of the benchmark: those of the paper, and tiny ones."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    d_in: int
    widths: tuple[int, ...]
    """Latents of the SAEs that are trained, ascending."""
    huge: int
    """Latents of one more SAE."""
    k: int
    batch: int
    """Activations per step."""
    matmul: int
    """Edge of the square matrices that give the rate of a product."""
    copied: int
    """Bytes copied to measure the bandwidth."""
    images: tuple[int, ...]
    """Per batch of the extraction."""
    scored: int
    """Images per part of the scoring."""
    requests: tuple[int, ...]
    """At once, of the steering."""
    vision: dict[str, Any]
    text: dict[str, Any]
    sites: tuple[str, ...]
    """The deepest of the residual ones last but for `projection`."""
    warmup: int
    rounds: int
    """Measurements, of which the median counts."""

    @property
    def d_sae(self) -> int:
        """Latents of the largest of the grid."""
        return self.widths[-1]


FULL = Sizes(
    d_in=1024, widths=(8192, 16384, 65536), huge=262_144, k=20, batch=4096, matmul=8192, copied=2**31,
    images=(64, 128, 256), scored=512, requests=(1, 8, 32),
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768},
    text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
          "vocab_size": 32064, "max_position_embeddings": 4096},
    sites=("layer11:cls", "layer17:cls", "layer22:cls", "layer23:cls", "projection"), warmup=5, rounds=15,
)  # fmt: skip
SMALL = Sizes(
    d_in=32, widths=(64, 256), huge=512, k=4, batch=64, matmul=64, copied=2**16,
    images=(2, 4), scored=4, requests=(1, 2),
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "projection_dim": 16},
    text={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
          "vocab_size": 64, "max_position_embeddings": 128},
    sites=("layer1:cls", "layer3:cls", "projection"), warmup=1, rounds=2,
)  # fmt: skip

"""What a GPU makes of training, extraction and steering, at the sizes of the paper, with random weights.

`python -m bench.gpu` writes `bench/results/gpu.json`. It needs torch with CUDA, transformers, safetensors, pyarrow and
numpy; neither Ray nor open_clip nor a network. A peer is measured where its package is installed. `--small` runs the
same code at tiny sizes, on a CPU too, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.contestants import ours
from bench.contestants.worker import Settings
from bench.record import Table, record
from sae_ray.encoders.base import Encoder, Tower
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sites import Site
from sae_ray.encoders.transformers_models import blocks_of
from sae_ray.sae import SAE
from sae_ray.steering.interventions import Intervention, LatentEdit
from sae_ray.steering.llava import Llava

SITES = ("layer11:cls", "layer17:cls", "layer22:cls", "layer23:cls", "projection")
CLIP_MEAN, CLIP_STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


class Sizes(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    batch: int
    matmul: int
    """Edge of the square matrices that give the rate of a product."""
    copied: int
    """Bytes copied to measure the bandwidth."""
    images: int
    """Per batch of the extraction."""
    vision: dict[str, int]
    text: dict[str, int]
    sites: tuple[str, ...]
    rounds: int
    steps: int
    """Per round."""


FULL = Sizes(
    d_in=1024, d_sae=65536, k=20, batch=4096, matmul=8192, copied=2**31, images=128,
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768},
    text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
          "vocab_size": 32064, "max_position_embeddings": 4096},
    sites=SITES, rounds=6, steps=10,
)  # fmt: skip
SMALL = Sizes(
    d_in=32, d_sae=256, k=4, batch=64, matmul=64, copied=2**16, images=2,
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "projection_dim": 16},
    text={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
          "vocab_size": 64, "max_position_embeddings": 128},
    sites=("layer1:cls", "layer3:cls", "projection"), rounds=3, steps=2,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all of it runs; writes nothing")
    small = parser.parse_args().small
    if not small and not torch.cuda.is_available():
        sys.exit("there is no GPU here; try --small")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMALL if small else FULL
    tables = [train(sizes, device), extract(sizes, device), steer(sizes, device)]
    for table in tables:
        print(table["title"], table["columns"], *table["rows"], sep="\n")
    if not small:
        print(record("gpu", tables, {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}))


def train(sizes: Sizes, device: torch.device) -> Table:
    """A BatchTopK step, nobody dead, against a dense one, installed peers and the floor."""
    d_in, d_sae, batch = sizes.d_in, sizes.d_sae, sizes.batch
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    amounts = torch.rand(sizes.steps, batch, 4 * d_in, generator=generator)
    data = torch.stack([(one * (one > 1 - 20 / (4 * d_in))) @ directions for one in amounts]).to(device)
    data /= data.square().sum(-1).mean().sqrt()
    W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(device)
    b_dec = data[0].mean(0)
    settings = Settings(d_in, d_sae, sizes.k, batch, 10_000, 1e-3, 0.9, False, torch.get_num_threads(), str(device))
    half = settings._replace(dtype="bfloat16")

    makers: dict[str, Callable[[], Any]] = {
        "sae-ray, bfloat16 product": lambda: ours.BatchTopK(half, W_dec, W_dec, b_dec),
        "sae-ray, float32": lambda: ours.BatchTopK(settings, W_dec, W_dec, b_dec),
        "dense step, float32": lambda: DenseStep(settings, W_dec, b_dec, "highest"),
        "dense step, TF32": lambda: DenseStep(settings, W_dec, b_dec, "high"),
        "dense step, bfloat16 products": lambda: DenseStep(half, W_dec, b_dec, "highest"),
    }
    for peer in ("dictionary_learning", "sae_lens"):
        if find_spec(peer):
            module = importlib.import_module(f"bench.contestants.{peer}")
            makers[peer] = lambda module=module: module.BatchTopK(settings, W_dec, W_dec, b_dec)

    floor = floor_ms(sizes, device)
    rows, ours_ms = [], None
    for name, make in makers.items():  # one after the other: at these sizes each needs its gigabytes
        contestant = make()
        step = contestant.step
        times = [timed(device, lambda at, step=step: step(data[at]), sizes.steps) for _ in range(sizes.rounds)][1:]
        with torch.no_grad():
            x_hat, n_active = contestant.reconstruct(data[0])
        r2 = 1 - (data[0] - x_hat).square().sum() / (data[0] - data[0].mean(0)).square().sum()
        ms = median(times)
        ours_ms = ours_ms or ms
        rows.append([name, f"{ms:.2f}", f"{ms / ours_ms:.2f}", f"{r2.item():.3f}", f"{n_active / batch:.1f}"])
        del contestant, step
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows.append(
        ["floor: product, pre-activations written and read, Adam", f"{floor:.2f}", f"{floor / ours_ms:.2f}", "", ""]
    )
    return Table(
        title=f"One BatchTopK step: d_in {d_in}, d_sae {d_sae}, batch {batch}, k {sizes.k}",
        columns=["step of", "ms", "times ours", "R² on a batch", "L0"],
        rows=rows,
    )


class DenseStep:
    """The step as it is usually written: dense codes, dense gradients, Adam, then the decoder's rows normalised."""

    def __init__(self, settings: Settings, W_dec: torch.Tensor, b_dec: torch.Tensor, precision: str):
        self.k, self.precision, self.dtype = settings.k, precision, getattr(torch, settings.dtype)
        self.W_enc = torch.nn.Parameter(W_dec.T.contiguous())
        self.W_dec = torch.nn.Parameter(W_dec.clone())
        self.b_enc = torch.nn.Parameter(W_dec.new_zeros(len(W_dec)))
        self.b_dec = torch.nn.Parameter(b_dec.clone())
        self.weights = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate)

    def step(self, batch: torch.Tensor) -> None:
        torch.set_float32_matmul_precision(self.precision)
        x_hat, _ = self._forward(batch)
        (batch - x_hat).square().sum(-1).mean().backward()
        with torch.no_grad():
            assert self.W_dec.grad is not None
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        torch.set_float32_matmul_precision("highest")

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x_hat, codes = self._forward(x)
        return x_hat, int((codes > 0).sum())

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            values = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
            top = values.flatten().topk(self.k * len(x), sorted=False)
            codes = torch.zeros_like(values).flatten().scatter(0, top.indices, top.values).view_as(values)
            return codes @ self.W_dec + self.b_dec, codes


def floor_ms(sizes: Sizes, device: torch.device) -> float:
    """From this machine's own rate of bfloat16 products and its bandwidth."""
    left, right = (torch.randn(sizes.matmul, sizes.matmul, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * sizes.matmul**3 / min(timed(device, lambda at: left @ right, 10) for _ in range(5))
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copied / min(timed(device, lambda at: target.copy_(source), 10) for _ in range(5))
    product = 2 * sizes.batch * sizes.d_in * sizes.d_sae / rate
    pre = 2 * 4 * sizes.batch * sizes.d_sae / bandwidth
    # Two weight matrices with two moments each, read and written; gradients are few rows.
    adam = 2 * 2 * 3 * 4 * sizes.d_in * sizes.d_sae / bandwidth
    return product + pre + adam


def make_clip(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A CLIP vision tower with random weights, as an encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device(device):
        module = CLIPVisionModelWithProjection._from_config(CLIPVisionConfig(**sizes.vision), dtype=dtype).eval()

    def embed(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = module.vision_model(pixel_values=pixels).pooler_output
        return {"pooled": pooled, "projection": module.visual_projection(pooled)}

    return Encoder(info_of(sizes, "clip"), Tower(module, blocks_of(module), embed, 1 / 255, CLIP_MEAN, CLIP_STD))


def info_of(sizes: Sizes, family: str) -> EncoderInfo:
    vision = sizes.vision
    edge = vision["image_size"]
    return EncoderInfo(
        model="random", revision=None, family=family, n_layers=vision["num_hidden_layers"],
        residual_width=vision["hidden_size"], projection_width=vision["projection_dim"],
        pooled_width=vision["hidden_size"], has_cls=True, n_registers=0,
        n_tokens=1 + (edge // vision["patch_size"]) ** 2, image_size=(edge, edge), has_text=False,
    )  # fmt: skip


def extract(sizes: Sizes, device: torch.device) -> Table:
    """Activations of batches of uint8 pixels that lie in the CPU's memory, against the bare forward pass on the GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = make_clip(sizes, device, dtype)
    edge = sizes.vision["image_size"]
    pixels = torch.randint(0, 256, (sizes.images, 3, edge, edge), dtype=torch.uint8)
    ready = torch.randn(sizes.images, 3, edge, edge, device=device, dtype=dtype)
    names = [str(number) for number in range(sizes.images)]
    sites = [Site.parse(site) for site in sizes.sites]

    @torch.inference_mode()
    def bare(at: int) -> None:
        encoder.tower.module(pixel_values=ready)

    def tap(wanted: list[Site]) -> Callable[[int], None]:
        def run(at: int) -> None:
            for tapped in encoder.tap(pixels, wanted, names, seed=0).values():
                tapped.activation.half().cpu()

        return run

    passes = {
        "bare forward": bare,
        "deepest site alone": tap(sites[-1:]),
        f"{len(sites)} sites in one pass": tap(sites),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(sizes.rounds):
        for name, run in passes.items():
            times[name].append(timed(device, run, sizes.steps))
    ms = {name: median(taken[1:]) for name, taken in times.items()}
    n_layers = sizes.vision["num_hidden_layers"]
    return Table(
        title=f"CLIP with {n_layers} layers at {edge} pixels, batch {sizes.images}, {str(dtype)[6:]}",
        columns=["what", "images/s", "time / bare forward"],
        rows=[
            [name, round(1000 * sizes.images / taken), f"{taken / ms['bare forward']:.3f}"]
            for name, taken in ms.items()
        ],
    )


def steer(sizes: Sizes, device: torch.device) -> Table:
    """Time to the first token of a LLaVA about one image, with and without a latent set in its vision tower."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    info = info_of(sizes, "llava")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=LlamaConfig(**sizes.text),
        image_token_index=sizes.text["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=info.n_tokens - 1,
    )
    dtype = torch.bfloat16
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    # Pixels are ready: what a processor takes is no part of this.
    processor = SimpleNamespace(image_processor=lambda images, return_tensors: {"pixel_values": torch.stack(images)})
    llava = Llava(info, info.n_layers - 2, model, processor)
    edge = sizes.vision["image_size"]
    pixels = torch.randn(3, edge, edge, device=device, dtype=dtype)
    words = torch.randint(0, 32, (35,), device=device)
    sae = random_sae(sizes, llava, pixels)
    edit = (LatentEdit(0, "set", 4.0),)

    @torch.no_grad()
    def first_token(edits: list[Intervention]) -> None:
        [image] = llava.image_embeddings([pixels], [edits])  # pyright: ignore[reportArgumentType]
        embedded = torch.cat([image, model.get_input_embeddings()(words)]).unsqueeze(0)
        model(inputs_embeds=embedded, logits_to_keep=1).logits[0, -1].argmax().item()

    ways = {
        "unsteered": [],
        "steered, tokens replaced by their reconstruction": [Intervention(sae, edit)],
        "steered, the reconstruction's error kept": [Intervention(sae, edit, error="keep")],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(4 * sizes.rounds):
        for name, edits in ways.items():
            times[name].append(timed(device, lambda at, edits=edits: first_token(edits), 1))
    ms = {name: median(taken[2:]) for name, taken in times.items()}
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return Table(
        title=f"Time to first token, LLaVA with {billions:.1f} billion random weights, SAE of {sizes.d_sae} latents",
        columns=["what", "ms", "against unsteered"],
        rows=[[name, f"{taken:.2f}", f"{taken / ms['unsteered']:.3f}"] for name, taken in ms.items()],
    )


@torch.no_grad()
def random_sae(sizes: Sizes, llava: Llava, pixels: torch.Tensor) -> SAE:
    """An SAE of the tower's width, of whose latents about `k` are active on a token of this image."""
    seen: list[torch.Tensor] = []
    hook = llava._block.register_forward_hook(lambda module, args, stream: seen.append(stream[0].float()), prepend=True)
    llava.image_embeddings([pixels], [[]])  # pyright: ignore[reportArgumentType]
    hook.remove()
    x = seen[0]
    W_dec = F.normalize(torch.randn(sizes.d_sae, llava.width, device=x.device), dim=1)
    pre = x @ W_dec.T
    threshold = pre.flatten().topk(sizes.k * len(x), sorted=False).values.amin()
    bias = W_dec.new_zeros
    return SAE(
        "batch_topk",
        W_dec.T.contiguous(),
        W_dec,
        bias(sizes.d_sae),
        bias(llava.width),
        threshold.expand(sizes.d_sae).clone(),
    )


def timed(device: torch.device, run: Callable[[int], Any], n: int) -> float:
    """Mean milliseconds of `n` calls, which are given their number."""
    synchronise(device)
    started = time.perf_counter()
    for number in range(n):
        run(number)
    synchronise(device)
    return 1000 * (time.perf_counter() - started) / n


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

"""Trains the projector of a LLaVA through its frozen language model: the first stage of LLaVA (Liu et al., 2304.08485).

Everything that a step does follows from the seed and its number, and a checkpoint holds the rest. So training that was
killed and goes on ends with the same bits, on the same machine and number of threads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sae_ray.errors import UsageError
from sae_ray.seeds import derived_seed
from sae_ray.steering.llava import Llava
from sae_ray.store.checkpoints import newest_checkpoint, save_checkpoint
from sae_ray.store.files import Folder
from tools.llava.captions import Said, drawn
from tools.llava.features import Features
from tools.llava.progress import Progress, Rate

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

SCALED_BY = 256
"""Images that mean and spread of the features are taken from."""
CHECKPOINT_SECONDS = 30.0
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Training:
    """How a projector is trained."""

    epochs: float = 3.0
    batch: int = 16
    peak_lr: float = 1e-3
    seed: int = 0

    def steps(self, n_images: int) -> int:
        return max(1, math.ceil(self.epochs * n_images / self.batch))


class Teacher:
    """The frozen language model of a LLaVA: how probable it finds answers, given what a projector made of images."""

    def __init__(self, llava: Llava):
        model: Any = llava.model.requires_grad_(False)
        self._llava = llava
        self._embed, self._decoder, self._head = model.get_input_embeddings(), model.model.language_model, model.lm_head
        self._before, _ = self._around_image("")
        self._read = None
        if len(self._before):
            # What stands before an image is the same for all, and is read once.
            with torch.no_grad():
                self._read = self._decoder(self._before[None], use_cache=True).past_key_values

    @property
    def spread(self) -> float:
        """Root of the mean square of its embeddings of words."""
        return self._embed.weight.float().square().mean().sqrt().item()

    def loss(self, images: Float[Tensor, "n tokens hidden"], asked: Sequence[tuple[str, str]]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, each with the end of the answer.

        Args:
            images: Embeddings, as the projector makes them.
            asked: Per image, a question and its answer.
        """
        rows = [self._after(question, answer) for question, answer in asked]
        ids = pad_sequence([row for row, _ in rows], batch_first=True)
        wanted = pad_sequence([row for _, row in rows], batch_first=True, padding_value=-100)
        lengths = torch.tensor([len(row) for row, _ in rows], device=ids.device)
        n_read = len(self._before) + images.shape[1]
        mask = torch.arange(n_read + ids.shape[1], device=ids.device) < n_read + lengths[:, None]
        past = copy.deepcopy(self._read)  # which the pass appends to
        if past is not None:
            past.batch_repeat_interleave(len(rows))
        hidden = self._decoder(
            inputs_embeds=torch.cat([images.to(self._embed.weight.dtype), self._embed(ids)], 1),
            attention_mask=mask.long(),
            past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state
        # A place predicts the next one.
        said = hidden[:, images.shape[1] - 1 : -1][wanted != -100]
        return nn.functional.cross_entropy(self._head(said).float(), wanted[wanted != -100])

    def _after(self, question: str, answer: str) -> tuple[Int[Tensor, " ids"], Int[Tensor, " ids"]]:
        """What stands after an image, and of that what is to be learnt."""
        before, asked = self._around_image(question)
        assert torch.equal(before, self._before), "all questions come after the image"
        tokenizer = self._llava.processor.tokenizer
        answered = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answered = answered[0].to(asked)
        return torch.cat([asked, answered]), torch.cat([torch.full_like(asked, -100), answered])

    def _around_image(self, question: str) -> tuple[Int[Tensor, " ids"], Int[Tensor, " ids"]]:
        ids = self._llava.token_ids(self._llava.prompt(question))
        place = (ids == self._llava.processor.image_token_id).nonzero().item()
        return ids[:place], ids[int(place) + 1 :]


def train_projector(
    llava: Llava,
    features: Features,
    said: Mapping[str, tuple[Said, ...]],
    training: Training,
    folder: Folder,
    progress: Progress,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> dict[str, Tensor]:
    """Trains from the newest checkpoint in `folder`, or from the beginning.

    AdamW without weight decay; the learning rate rises over a tenth of the steps and falls along a cosine. Features are
    standardised, and the projector begins with embeddings as large as those of words.

    Returns:
        The weights of the projector, float32, for features as they are.

    Raises:
        UsageError: The checkpoint is of another projector.
    """
    n, steps = len(features), training.steps(len(features))
    teacher, device = Teacher(llava), llava.device
    mean, std = _scale(features)
    projector = _beginning(llava, features, (mean, std), teacher.spread, training.seed).to(device)
    optimizer = torch.optim.AdamW(projector.parameters(), training.peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    done, loss = _restore(folder, projector, optimizer)
    saved, rate = time.monotonic(), Rate(done * training.batch, steps * training.batch, "samples")
    for step in range(done, steps):
        places, asked = batch_of(step, features.image_ids, said, training)
        images = projector(_standardised(features.rows(places), mean, std).to(device))
        found = teacher.loss(images, asked)
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = training.peak_lr * _schedule(step, steps)
        optimizer.step()
        loss = found.item() if loss is None else 0.95 * loss + 0.05 * found.item()
        progress(f"projector: {rate.line((step + 1) * training.batch)}, loss {loss:.3f}")
        if step + 1 == steps or time.monotonic() - saved > checkpoint_seconds:
            _save(folder, step + 1, projector, optimizer, loss)
            saved = time.monotonic()
    if loss is not None:
        progress.say(f"the projector is trained: {steps:,} steps of {training.batch} of {n:,} images, loss {loss:.3f}")
    return _folded(projector, mean, std)


def batch_of(
    step: int, image_ids: Sequence[str], said: Mapping[str, tuple[Said, ...]], training: Training
) -> tuple[list[int], list[tuple[str, str]]]:
    """The images of a step by their places, and a question and answer for each. Epochs are shuffled."""
    n = len(image_ids)
    numbers = range(step * training.batch, (step + 1) * training.batch)
    places = [_order(n, training.seed, number // n)[number % n] for number in numbers]
    chance = Random(derived_seed(training.seed, f"questions of step {step}"))
    return places, [drawn(said[image_ids[place]], chance) for place in places]


@lru_cache(2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, f"epoch {epoch}"))
    return torch.randperm(n, generator=generator).tolist()


def faster_dtype(device: str) -> str:
    """float32 or bfloat16, in which products of matrices take less time here."""
    if device != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weights = (torch.ones(rows, 1024, dtype=dtype) for rows in (512, 4096))
        tried = []
        for _ in range(5):
            begun = time.perf_counter()
            x @ weights.T
            tried.append(time.perf_counter() - begun)
        seconds[str(dtype).removeprefix("torch.")] = min(tried)
    return min(seconds, key=lambda dtype: seconds[dtype])


def _scale(features: Features) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Mean and standard deviation of each dimension, over images that are evenly spread."""
    n = len(features)
    some = features.rows([place * n // min(n, SCALED_BY) for place in range(min(n, SCALED_BY))]).flatten(0, 1)
    return some.mean(0), some.std(0).clamp_min(1e-6)


def _standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (x - mean) / std


def _beginning(llava: Llava, features: Features, scale: tuple[Tensor, Tensor], spread: float, seed: int) -> Any:
    """A new projector, float32, on standardised features."""
    torch.manual_seed(derived_seed(seed, "projector"))
    projector = copy.deepcopy(llava.model.model.multi_modal_projector).float().cpu().requires_grad_(True)
    for one in (projector.linear_1, projector.linear_2):
        one.reset_parameters()
        nn.init.zeros_(one.bias)
    with torch.no_grad():
        made = projector(_standardised(features.rows(range(min(len(features), 16))), *scale))
        projector.linear_2.weight *= spread / made.square().mean().sqrt()
    return projector


def _schedule(step: int, steps: int) -> float:
    rising = max(1.0, WARM_UP * steps)
    if step < rising:
        return (step + 1) / rising if rising > 1 else 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


@torch.no_grad()
def _folded(projector: Any, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The weights for features that are not standardised."""
    folded = copy.deepcopy(projector).cpu()
    folded.linear_1.weight /= std
    folded.linear_1.bias -= folded.linear_1.weight @ mean
    return folded.state_dict()


def _save(folder: Folder, step: int, projector: nn.Module, optimizer: torch.optim.Optimizer, loss: float) -> None:
    tensors = dict(projector.state_dict())
    for name, weights in projector.named_parameters():
        tensors |= {f"{name}.{key}": optimizer.state[weights][key] for key in _STATE}
    save_checkpoint(folder, step, {name: one.detach().cpu().contiguous() for name, one in tensors.items()},
                    {"step": step, "loss": loss})  # fmt: skip


def _restore(folder: Folder, projector: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
    """The number of steps that are done, and the loss by then."""
    found = newest_checkpoint(folder)
    if found is None:
        return 0, None
    tensors, facts = found
    for name, weights in projector.named_parameters():
        if name not in tensors or tensors[name].shape != weights.shape:
            raise UsageError(
                f"the checkpoint in {folder} does not fit this projector: {name} is "
                f"{list(tensors[name].shape) if name in tensors else 'missing'}, not {list(weights.shape)}; delete the "
                "folder to begin again"
            )
        optimizer.state[weights] = {
            key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else weights.device) for key in _STATE
        }
    projector.load_state_dict({name: tensors[name] for name in projector.state_dict()})
    return facts["step"], facts["loss"]

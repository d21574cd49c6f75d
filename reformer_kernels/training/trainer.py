"""The training loop behind `reformer-kernels train`: steps, evaluation, sampling, checkpoints.

A resumed run repeats an uninterrupted one exactly: a step's text depends on (seed, step) alone, and the
checkpoint holds the weights, the optimizer's state and torch's generator, from which rotations are drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.models import ReformerLM
from reformer_kernels.models import files as checkpoint
from reformer_kernels.models.files import CheckpointError
from reformer_kernels.training.language_model import byte_model
from reformer_kernels.training.muon import Muon
from reformer_kernels.training.text import Text

FORMAT = 2
WARM_UP_STEPS = 20
FINAL_LEARNING_RATE_SHARE = 0.1
GRADIENT_NORM = 1.0
LEARNING_RATE_SHARES = (1.0, 2.0)
"""Of the recipe's rate: AdamW's and Muon's."""


class DivergedError(Exception):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's numbers, besides the text."""

    seq_len: int = 4096
    batch: int = 1
    layers: int = 2
    dim: int = 256
    heads: int = 4
    hashes: int = 2
    chunk: int = 64
    lr: float = 1e-2
    steps: int = 200
    seed: int = 0


class Trainer:
    """A model, its optimizer and its place in the run."""

    def __init__(
        self, recipe: Recipe, text: Text, backend: str = "auto", model: ReformerLM | None = None
    ) -> None:
        """`model`: another model of bytes than the recipe's own."""
        self.recipe = recipe
        self.text = text
        self.step = 0
        torch.manual_seed(recipe.seed)
        self.model = model or byte_model(
            dim=recipe.dim,
            layers=recipe.layers,
            heads=recipe.heads,
            n_hashes=recipe.hashes,
            chunk_length=recipe.chunk,
            seq_len=recipe.seq_len,
            backend=backend,
        )
        layers = self.model.reformer.layers
        matrices = [parameter for parameter in layers.parameters() if parameter.dim() == 2]
        held = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in held]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95)),
            Muon(matrices, lr=recipe.lr),
        ]

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch * self.recipe.seq_len

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Random windows of the text: inputs and next bytes, (batch, seq_len) int64."""
        length = self.recipe.seq_len
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        last = self.text.train.numel() - length
        starts = torch.randint(last, (self.recipe.batch,), generator=generator).tolist()
        windows = torch.stack([self.text.train[start : start + length + 1] for start in starts]).long()
        return windows[:, :-1], windows[:, 1:]

    def learning_rate(self, step: int) -> float:
        """Rises over the first steps, then falls in a straight line to a tenth at the last."""
        recipe = self.recipe
        rise = min(1.0, (step + 1) / min(WARM_UP_STEPS, recipe.steps))
        fall = 1.0 - (1.0 - FINAL_LEARNING_RATE_SHARE) * min(1.0, step / max(1, recipe.steps))
        return recipe.lr * rise * fall

    def train_step(self) -> float:
        """One optimizer step; its loss in bits per byte.

        Raises:
            DivergedError: the loss is not finite; the weights are as they were before the step.
        """
        self.model.train()
        inputs, targets = self._batch(self.step)
        loss = self.model(inputs, labels=targets, shift_labels=False)
        if not math.isfinite(value := loss.item()):
            raise DivergedError(
                f"the loss became {value} at step {self.step}; try a smaller --lr than {self.recipe.lr}"
            )
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        for optimizer, share in zip(self.optimizers, LEARNING_RATE_SHARES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * self.learning_rate(self.step)
            optimizer.step()
        self.step += 1
        return value / math.log(2)

    @torch.no_grad()
    def evaluate(self, windows: int, stop: Callable[[], bool] = lambda: False) -> float:
        """Bits per byte on up to `windows` windows spread over the held-out text."""
        self.model.eval()
        length = self.recipe.seq_len
        held_out = self.text.held_out
        count = max(1, min(windows, held_out.numel() // (length + 1)))
        spacing = (held_out.numel() - length - 1) // max(1, count - 1)
        total = 0.0
        done = 0
        for index in range(count):
            window = held_out[index * spacing : index * spacing + length + 1].long().unsqueeze(0)
            total += self.model(window[:, :-1], labels=window[:, 1:], shift_labels=False).item()
            done += 1
            if stop():
                break
        return total / done / math.log(2)

    def sample(
        self, prompt: bytes, count: int, temperature: float = 0.8, stop: Callable[[], bool] = lambda: False
    ) -> bytes:
        """Up to `count` bytes drawn one by one after `prompt`, the same for the same weights."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        tokens = torch.tensor([list(prompt)], dtype=torch.int64)
        written = []
        for token in self.model.stream(tokens, count, temperature=temperature, generator=generator):
            written.append(int(token))
            if stop():
                break
        return bytes(written)

    # -- checkpoints --------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the checkpoint; `ReformerLM.load` reads the model in it too."""
        state = {
            **self.model.contents(),
            "format": FORMAT,
            "recipe": dataclasses.asdict(self.recipe),
            "text_sha256": self.text.sha256,
            "step": self.step,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": torch.get_rng_state(),
        }
        checkpoint.write(state, path)

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Take up the run where `state` left it.

        Raises:
            CheckpointError: it belongs to another text or its tensors do not fit.
        """
        if state["text_sha256"] != self.text.sha256:
            raise CheckpointError(
                f"{path} was trained on another text than {self.text.name}; resume with the same text"
            )
        try:
            self.model.load_state_dict(state["state_dict"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            torch.set_rng_state(state["generator"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
        self.step = int(state["step"])


def read_checkpoint(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """A checkpoint's recipe and whole state, loaded without running any code from the file.

    Raises:
        CheckpointError: not there, or not a checkpoint of this program.
    """
    state = checkpoint.read(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of reformer-kernels train")
    try:
        recipe = Recipe(**state["recipe"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not complete: {error}") from error
    missing = {"text_sha256", "step", "state_dict", "optimizers", "generator"} - state.keys()
    if missing:
        raise CheckpointError(f"{path} is not complete: it lacks {', '.join(sorted(missing))}")
    return recipe, state

"""The training loop behind `reformer-kernels train`: steps, evaluation, sampling, checkpoints.

A resumed run repeats an uninterrupted one exactly: the text of a step depends on (seed, step) alone, and a
checkpoint holds the weights, the optimizers' state and that of torch's generator, which draws the rotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reformer_kernels.models import CheckpointError, ReformerLM
from reformer_kernels.training.byte_model import byte_model
from reformer_kernels.training.checkpoint import (
    Checkpoint,
    Recipe,
    read_checkpoint,
    read_model,
    recipe_config,
    restore_training,
    training_tensors,
    write_checkpoint,
)
from reformer_kernels.training.text import Text

WARM_UP_STEPS = 20
FINAL_LEARNING_RATE_SHARE = 0.1
GRADIENT_NORM = 1.0
MUON_SHARE = 2.0
"""Muon's learning rate, in units of the recipe's, which is AdamW's."""


class DivergedError(Exception):
    """The loss is no longer a finite number."""


class Trainer:
    """A model, its optimizers and the step that the run has reached.

    Where torch has Muon (from 2.9 on), it updates the matrices inside the layers, and AdamW updates the rest.
    Within a few hundred steps Muon learns much more than AdamW (after 60 steps of the default run without
    attention: 2.9 bits per byte against 3.7). On an older torch AdamW updates everything, see `note`.

    Args:
        recipe: sizes, learning rate and seed.
        text: what to learn.
        backend: the back end of attention.
        model: a model of bytes that replaces the recipe's own.
    """

    def __init__(
        self, recipe: Recipe, text: Text, backend: str = "auto", model: ReformerLM | None = None
    ) -> None:
        self.recipe = recipe
        self.text = text
        self.step = 0
        torch.manual_seed(recipe.seed)
        self.model = model or byte_model(recipe_config(recipe, backend))
        self.optimizers = make_optimizers(self.model, recipe.lr)

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        return tuple(type(optimizer).__name__ for optimizer in self.optimizers)

    @property
    def note(self) -> str | None:
        """What a user must know about this run's optimizers, if anything."""
        if "Muon" in self.optimizer_names:
            return None
        return (
            f"torch {torch.__version__} has no torch.optim.Muon (2.9 and later have it): AdamW updates all "
            "parameters, and the model learns more slowly."
        )

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch * self.recipe.seq_len

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        """Random windows of the text: inputs and next bytes, both (batch, seq_len) int64."""
        length = self.recipe.seq_len
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        last = self.text.train.numel() - length
        starts = torch.randint(last, (self.recipe.batch,), generator=generator).tolist()
        windows = torch.stack([self.text.train[start : start + length + 1] for start in starts]).long()
        return windows[:, :-1], windows[:, 1:]

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step: it rises over the first steps, then falls linearly to a tenth."""
        recipe = self.recipe
        rise = min(1.0, (step + 1) / min(WARM_UP_STEPS, recipe.steps))
        fall = 1.0 - (1.0 - FINAL_LEARNING_RATE_SHARE) * min(1.0, step / max(1, recipe.steps))
        return recipe.lr * rise * fall

    def train_step(self) -> float:
        """Take one optimizer step and return its loss in bits per byte.

        Raises:
            DivergedError: the loss is not finite; the weights stay as they were before the step.
        """
        self.model.train()
        inputs, targets = self.batch_of(self.step)
        loss = self.model(inputs, labels=targets, shift_labels=False)
        if not math.isfinite(value := loss.item()):
            raise DivergedError(
                f"the loss became {value} at step {self.step}; try a smaller --lr than {self.recipe.lr}"
            )
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        for optimizer, name in zip(self.optimizers, self.optimizer_names, strict=True):
            share = MUON_SHARE if name == "Muon" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = share * self.learning_rate(self.step)
            optimizer.step()
        self.step += 1
        return value / math.log(2)

    @torch.no_grad()
    def evaluate(self, windows: int, stop: Callable[[], bool] = lambda: False) -> float:
        """The loss in bits per byte on up to `windows` windows spread over the held-out text."""
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
        """Up to `count` bytes drawn after `prompt`, the same for the same weights and seed."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        tokens = torch.tensor([list(prompt)], dtype=torch.int64)
        written = []
        for token in self.model.stream(tokens, count, temperature=temperature, generator=generator):
            written.append(int(token))
            if stop():
                break
        return bytes(written)

    def save(self, folder: Path) -> None:
        """Write a checkpoint, a folder from which `ReformerLM.load` reads the model too.

        Raises:
            OSError: it cannot be written; then an older checkpoint in the folder stays whole.
        """
        write_checkpoint(
            folder,
            self.model,
            Checkpoint(
                recipe=self.recipe,
                text_sha256=self.text.sha256,
                step=self.step,
                optimizers=self.optimizer_names,
                tensors=training_tensors(self.optimizers),
            ),
        )

    @classmethod
    def resume(
        cls, folder: Path, text: Text, *, recipe: Recipe | None = None, backend: str = "auto"
    ) -> Trainer:
        """Take up a run from its checkpoint.

        Args:
            folder: what `save` wrote.
            text: the run's text.
            recipe: replaces the saved one; only `steps` and `lr` may differ from it.
            backend: the back end of attention.

        Raises:
            CheckpointError: there is no such run, it is damaged, of another text, or written with optimizers
                that this version of torch does not have.
        """
        checkpoint = read_checkpoint(folder)
        if checkpoint.text_sha256 != text.sha256:
            raise CheckpointError(
                f"{folder} was trained on another text than {text.name}; resume with the same text"
            )
        model = read_model(folder, checkpoint.recipe, backend)
        trainer = cls(checkpoint.recipe if recipe is None else recipe, text, model=model)
        if trainer.optimizer_names != checkpoint.optimizers:
            raise CheckpointError(
                f"{folder} was trained with {' and '.join(checkpoint.optimizers)}; torch {torch.__version__} "
                f"would continue with {' and '.join(trainer.optimizer_names)}; resume with a torch like the "
                "one that wrote it"
            )
        try:
            restore_training(trainer.optimizers, checkpoint.tensors)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder} does not fit its model: {error}") from error
        trainer.step = checkpoint.step
        return trainer


def make_optimizers(model: ReformerLM, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the layers where torch has it."""
    betas = (0.9, 0.95)
    if not hasattr(torch.optim, "Muon"):
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=betas)]
    matrices = [parameter for parameter in model.reformer.layers.parameters() if parameter.dim() == 2]
    in_layers = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_layers]
    return [
        torch.optim.AdamW(others, lr=lr, betas=betas),
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
    ]

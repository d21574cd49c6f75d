"""The trainer's checkpoint: a model's folder that also holds `training.json` and `training.safetensors`.

training.json holds the recipe, the step, the digest of the text, the names of the optimizers and the digests
of both tensor files; training.safetensors holds the optimizers' state and that of torch's random generator.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._limits import MAX_LENGTH
from reformer_kernels.config import MAX_CHUNK_LENGTH, MAX_HASHES
from reformer_kernels.models import CheckpointError, ReformerConfig, ReformerLM, files
from reformer_kernels.models.config import MAX_SIZE
from reformer_kernels.training.byte_model import byte_config, not_finite

STATE = "training.json"
STATE_TENSORS = "training.safetensors"
FORMAT = "reformer-kernels training"
RANDOM_STATE = "random_state"

LIMITS: dict[str, int | float] = {
    "seq_len": MAX_LENGTH,
    "batch": MAX_SIZE,
    "layers": 10_000,
    "dim": MAX_SIZE,
    "heads": MAX_SIZE,
    "hashes": MAX_HASHES,
    "chunk": MAX_CHUNK_LENGTH,
    "lr": 1e6,
    "steps": MAX_SIZE,
    "seed": 2**40 - 1,
}
"""The largest value of each part of a recipe."""


@dataclass(frozen=True)
class Recipe:
    """Everything besides the text that decides the numbers of a run."""

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


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was saved, besides the model.

    Attributes:
        recipe: the run's recipe.
        text_sha256: the digest of the text that it learns.
        step: the number of steps done.
        optimizers: the class of each optimizer.
        tensors: the optimizers' state and the random state, by name.
    """

    recipe: Recipe
    text_sha256: str
    step: int
    optimizers: tuple[str, ...]
    tensors: Mapping[str, Tensor]


def write_checkpoint(folder: Path, model: files.Saveable, checkpoint: Checkpoint) -> None:
    """Write model and run to `folder`; where that fails, an older checkpoint in it stays whole.

    Raises:
        OSError: the folder cannot be written, for want of space or permission.
    """
    contents = files.model_files(model)
    tensors = files.to_bytes(checkpoint.tensors)
    state = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(checkpoint.recipe),
        "text_sha256": checkpoint.text_sha256,
        "step": checkpoint.step,
        "optimizers": list(checkpoint.optimizers),
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "model_sha256": hashlib.sha256(contents[files.TENSORS]).hexdigest(),
    }
    contents |= {STATE_TENSORS: tensors, STATE: files.json_bytes(state)}
    files.write_folder(folder, contents)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The run in `folder`. Nothing in the files can run code.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or holds a model without a run.
    """
    model_sha256 = files.read_config(folder).get("sha256")
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds a model but no run to resume: it has no {STATE}")
    state = files.read_json(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not of reformer-kernels train: its format is {state.get('format')!r}"
        )
    missing = {"recipe", "text_sha256", "step", "optimizers", "sha256", "model_sha256"} - state.keys()
    if missing:
        raise CheckpointError(f"{path} is not complete: it lacks {', '.join(sorted(missing))}")
    if state["model_sha256"] != model_sha256:
        raise CheckpointError(f"{folder} is damaged: its model and {STATE} are of different steps")
    try:
        recipe = _checked_recipe(state["recipe"])
        step = _checked_integer("step", state["step"], 0)
        optimizers = tuple(str(name) for name in state["optimizers"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    tensors = files.read_tensors(folder / STATE_TENSORS, sha256=state["sha256"])
    return Checkpoint(recipe, str(state["text_sha256"]), step, optimizers, tensors)


def read_model(folder: Path, recipe: Recipe, backend: str) -> ReformerLM:
    """The model of a checkpoint, to go on training with this back end.

    Raises:
        CheckpointError: there is no such model, it is not the one that the recipe describes, or its weights
            are not finite.
    """
    model = files.load_model(folder, [ReformerLM], backend=backend)
    described = recipe_config(recipe, backend)
    differing = [
        f"{field.name} is {getattr(model.config, field.name)!r}, must be {getattr(described, field.name)!r}"
        for field in dataclasses.fields(described)
        if getattr(model.config, field.name) != getattr(described, field.name)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} is damaged: the model is not the one of the recipe in {STATE}: {'; '.join(differing)}"
        )
    if broken := not_finite(model):
        raise CheckpointError(
            f"the weights in {folder} are not finite ({', '.join(broken[:3])}); train again with a smaller lr"
        )
    return model


def recipe_config(recipe: Recipe, backend: str) -> ReformerConfig:
    """The configuration of the model that a recipe describes."""
    return byte_config(
        dim=recipe.dim,
        layers=recipe.layers,
        heads=recipe.heads,
        n_hashes=recipe.hashes,
        chunk_length=recipe.chunk,
        seq_len=recipe.seq_len,
        backend=backend,
    )


def training_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state, as "optimizer.<index>.<parameter>.<name>", and torch's random state."""
    tensors = {RANDOM_STATE: torch.get_rng_state()}
    for index, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{parameter}.{name}": value for name, value in values.items()}
    return tensors


def restore_training(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Take up the state that `training_tensors` gave.

    The optimizers' options, such as the learning rate, are not stored: the recipe decides them.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: the state does not fit; then nothing is changed.
    """
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        if name == RANDOM_STATE:
            continue
        kind, optimizer_index, parameter_index, part = name.split(".")
        if kind != "optimizer":
            raise ValueError(f"unknown tensor {name}")
        states[int(optimizer_index)].setdefault(int(parameter_index), {})[part] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters: list[Tensor] = [x for group in optimizer.param_groups for x in group["params"]]
        for index, values in state.items():
            for part, value in values.items():
                if value.shape not in (torch.Size([]), parameters[index].shape):
                    raise ValueError(f"wrong shape: {part} of parameter {index} is {tuple(value.shape)}")
    random_state = tensors[RANDOM_STATE]
    before = torch.get_rng_state()
    if random_state.dtype != torch.uint8 or random_state.shape != before.shape:
        raise ValueError(f"{RANDOM_STATE} is no state of torch's generator")
    torch.set_rng_state(random_state)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checked_recipe(values: Any) -> Recipe:
    recipe = Recipe(**values)
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if field.name == "lr":
            if not isinstance(value, int | float) or not 0 < value <= LIMITS["lr"]:
                raise ValueError(f"lr must be above 0 and at most {LIMITS['lr']:g}, got {value!r}")
        else:
            _checked_integer(field.name, value, 0 if field.name == "seed" else 1, LIMITS[field.name])
    return recipe


def _checked_integer(name: str, value: Any, least: int, most: float = MAX_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return value

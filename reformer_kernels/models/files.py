"""Models in files: one file holds the class' name, the configuration and the weights, and runs no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T", bound="Saved")


class CheckpointError(ValueError):
    """A file that holds no such model; the message says why."""


class Saved(nn.Module):
    """A module that can be written to a file and made from it.

    Subclasses give their configuration as a plain dictionary and can be made of it.
    """

    def config_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_config_dict(cls: type[T], config: dict[str, Any]) -> T:
        """Raises ValueError or TypeError where it is none."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make shared parameters one again, after each was loaded."""

    def contents(self) -> dict[str, Any]:
        """What `save` writes: plain values and tensors."""
        return {
            "class": type(self).__name__,
            "config": self.config_dict(),
            "state_dict": self.state_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write class, configuration and weights to a file. A failed write leaves an old file whole."""
        write(self.contents(), Path(path))

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """The model that `save` wrote, on the CPU, in training mode, with the very same weights.

        Draws no random numbers and runs no code from the file.

        Raises:
            CheckpointError: not there, damaged, of another class, or with other weights than its
                configuration asks for.
        """
        return cls.from_contents(read(Path(path)), str(path))

    @classmethod
    def from_contents(cls: type[T], contents: dict[str, Any], name: str) -> T:
        """The model of `contents`, read from the file `name`; see `load`."""
        missing = {"class", "config", "state_dict"} - contents.keys()
        if missing:
            raise CheckpointError(f"{name} holds no model: it lacks {', '.join(sorted(missing))}")
        if contents["class"] != cls.__name__:
            raise CheckpointError(f"{name} holds a {contents['class']}, not a {cls.__name__}")
        try:
            with torch.device("meta"):
                model = cls.from_config_dict(contents["config"])
            model.load_state_dict(contents["state_dict"], assign=True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{name} holds no whole {cls.__name__}: {error}") from error
        model.tie_weights()
        return model


def write(contents: dict[str, Any], path: Path) -> None:
    """Write beside `path` and rename, so that a crash leaves the old file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(contents, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A file's contents, without running any code from it. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its readers do on a damaged file
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(contents).__name__}")
    return contents

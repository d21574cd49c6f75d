"""Models in folders: `config.json` and `model.safetensors`, neither of which can run code.

config.json holds "format": "reformer-kernels", the model's "class", its "config" and the "sha256" of
model.safetensors, which is checked when the model is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reformer_kernels import _files

CONFIG = "config.json"
TENSORS = "model.safetensors"
FORMAT = "reformer-kernels"

T = TypeVar("T", bound="Saveable")


class CheckpointError(ValueError):
    """A folder or file that holds no such model; the message says why."""


class Saveable(nn.Module):
    """A model that `save` writes to a folder and `load` makes from it.

    Subclasses give their configuration as a plain dictionary and can be made from it.
    """

    def config_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_config_dict(cls: type[T], config: dict[str, Any]) -> T:
        """Make the model. Raises KeyError, TypeError or ValueError for anything but its configuration."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make shared parameters one again, after each of them was loaded."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors to `folder`, which is made if it does not exist.

        Other files in it stay. A failed write leaves an older model in the folder whole.

        Raises:
            OSError: the folder cannot be written, for want of space or permission.
        """
        write_folder(Path(folder), model_files(self))

    @classmethod
    def load(cls: type[T], folder: str | os.PathLike[str]) -> T:
        """The model that `save` wrote, on the CPU, in training mode, with the very same weights.

        Draws no random numbers and runs no code from the files.

        Raises:
            CheckpointError: there is no such folder, it is damaged or was written by something else, holds a
                model of another class, or other weights than its configuration asks for.
        """
        return load_model(Path(folder), [cls])


def load_model(folder: Path, classes: Sequence[type[T]], *, backend: str | None = None) -> T:
    """The model in `folder`, which must be of one of the classes; `backend` replaces the one saved with it.

    Raises CheckpointError: see `Saveable.load`.
    """
    contents = read_config(folder)
    missing = {"class", "config", "sha256"} - contents.keys()
    if missing:
        raise CheckpointError(f"{folder / CONFIG} is not complete: it lacks {', '.join(sorted(missing))}")
    found = next((cls for cls in classes if cls.__name__ == contents["class"]), None)
    if found is None:
        wanted = " or ".join(cls.__name__ for cls in classes)
        raise CheckpointError(f"{folder} holds a model of class {contents['class']!r}, not a {wanted}")
    tensors = read_tensors(folder / TENSORS, sha256=contents["sha256"])
    try:
        config = contents["config"] if backend is None else _with_backend(contents["config"], backend)
        check_entries(config, tensors)
        # On the meta device even absurd sizes take no memory before they are compared with the file's.
        with torch.device("meta"):
            model = found.from_config_dict(config)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a {found.__name__}: {error}") from error
    expected = _unique_tensors(model)
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unknown: {name}" for name in tensors if name not in expected]
    problems += [
        f"wrong shape: {name} is {tuple(tensors[name].shape)}, must be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems += [
        f"wrong dtype: {name} is {x.dtype}" for name, x in tensors.items() if not x.dtype.is_floating_point
    ]
    if problems:
        raise CheckpointError(f"{folder / TENSORS} does not fit {CONFIG}:\n  " + "\n  ".join(problems[:20]))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model


def model_files(model: Saveable) -> dict[str, bytes]:
    """The names and contents of the two files that hold a model."""
    tensors = to_bytes(_unique_tensors(model))
    config = {
        "format": FORMAT,
        "class": type(model).__name__,
        "config": model.config_dict(),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return {TENSORS: tensors, CONFIG: json_bytes(config)}


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; a tensor that has several names is there under the first one only."""
    named: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, value in state.items():
        named.setdefault(id(value), name)
    return {name: state[name].detach() for name in named.values()}


def _with_backend(config: Any, backend: str) -> Any:
    """`config` with every "backend" in it replaced."""
    if not isinstance(config, dict):
        return config
    return {key: backend if key == "backend" else _with_backend(x, backend) for key, x in config.items()}


def check_entries(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration with more layers or axes than there are tensors, before any is made.

    Each entry of a configuration's lists costs time, even on the meta device, and owns a tensor at least.
    """
    most = max(len(tensors), 64)
    values = config.items() if isinstance(config, Mapping) else ()
    for name, value in values:
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise ValueError(f"{name} has {len(value)} entries, the file of tensors only {len(tensors)}")
        check_entries(value, tensors)


# Folders and files


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files of a model to `folder`, or none of them."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"models are saved as folders, {folder} is a file; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_together({folder / name: data for name, data in files.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in this package's format. Raises CheckpointError for anything else."""
    if not folder.exists():
        raise CheckpointError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file; a model is a folder with {CONFIG} and {TENSORS}, as save writes it. "
            "Single files, such as pickles, are not read"
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no {CONFIG}")
    contents = read_json(folder / CONFIG)
    if not is_ours(contents):
        if "model_type" in contents or "architectures" in contents:
            raise CheckpointError(
                f"{folder} was written by transformers; read it with reformer_kernels.hf.from_pretrained"
            )
        raise CheckpointError(
            f'{folder / CONFIG} is of another program: its "format" must be {FORMAT!r}, '
            f"got {contents.get('format')!r}"
        )
    return contents


def is_ours(contents: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this package's format."""
    return contents.get("format") == FORMAT


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, and FileNotFoundError where there is none."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path.name} in {str(path.parent)!r}") from error
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(contents).__name__}")
    return contents


def json_bytes(contents: Mapping[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its digest is not `sha256`.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name} in {path.parent}")
    try:
        if sha256 is not None and _digest(path) != sha256:
            raise CheckpointError(
                f"{path} is damaged or belongs to another model: its sha256 is not the one saved with it"
            )
        # Copied out of the mapped file into aligned memory: matrix products round differently elsewhere.
        return {name: x.clone() for name, x in safetensors.torch.load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of the tensors."""
    plain: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in tensors.items():
        x = value.detach().cpu().contiguous()
        if x.data_ptr() in written or x.untyped_storage().nbytes() != x.nbytes:
            x = x.clone()  # safetensors refuses tensors that share memory
        written.add(x.data_ptr())
        plain[name] = x
    return bytes(safetensors.torch.save(plain, {"format": "pt"}))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

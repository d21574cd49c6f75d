"""Checkpoint folders as transformers writes them: config.json and parameters, read and written without it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels._checks import kind_of
from reformer_kernels.hf import conversion
from reformer_kernels.models import ReformerClassifier

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = ".index.json"


def from_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> nn.Module:
    """Read a checkpoint folder of a transformers Reformer into one of our models. transformers is not needed.

    The folder has config.json and model.safetensors or pytorch_model.bin, in one file or in shards with an
    index. Pickled files are read with `weights_only=True`: they cannot run code.

    The model hashes and attends as transformers does (`LSHConfig.trax`, local attention that wraps around),
    with these differences: the language model's logits include `lm_head.bias`; any length works without
    padding by the caller; with a padding mask, positions count tokens alone (transformers' own positions are
    `position_ids=torch.arange(L)`); in evaluation the rotations are fixed by `hash_seed` (0 where it is
    null); where `num_buckets` is null, buckets are those of `max_position_embeddings` tokens for a causal
    model and of each call's length for others (transformers: of the first call's); dropout of the
    feed-forward layer comes after the activation.

    Args:
        path: the folder.
        dtype: of the parameters; None: as stored.
        backend: of attention: "auto", "reference", "native" or "triton".

    Returns:
        By the configuration's `architectures`, or where it names none by the parameters: `ReformerLM`
        (causal, or for a masked language model not), `ReformerClassifier`, `ReformerQuestionAnswering` or
        `Reformer`; in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: the folder or a file is not there.
        ValueError: a file is damaged, the configuration is no Reformer's or has values that are not accepted,
            or the parameters do not fit it.
        ImportError: a safetensors file, and the safetensors package is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"path must be a checkpoint folder, there is none at {str(path)!r}; models on the hub can be "
            "fetched with huggingface_hub.snapshot_download"
        )
    values = _read_json(folder / CONFIG)
    parameters = _read_parameters(folder)
    try:
        model = _make(values, parameters, backend)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if dtype is None:
        dtype = next((x.dtype for x in parameters.values() if x.is_floating_point()), torch.float32)
    model.to(dtype)
    conversion.load_state_dict(model, parameters)
    setattr(model, conversion.KEPT, values)
    return model.eval()


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write one of our models as a checkpoint folder that transformers loads: config.json, model.safetensors.

    What our configuration does not hold (the numbers of special tokens, names of labels) is written as it was
    read, for a model that `from_pretrained` made. The head's bias is written under both of its names:
    transformers before 5.24 reports `lm_head.decoder.bias` as unexpected and leaves the bias out of its
    logits.

    Args:
        model: a `Reformer`, `ReformerLM`, `ReformerClassifier` or `ReformerQuestionAnswering`.
        path: the folder; made if it is not there. Files in it of the two names are replaced.

    Raises:
        TypeError, ValueError: transformers has no such model; all reasons are listed and nothing is written.
        ImportError: the safetensors package is not installed.
    """
    values = conversion.config_to(model)
    parameters = {name: value.clone() for name, value in conversion.state_dict(model).items()}
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    safetensors = _safetensors()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values["dtype"] = dtype
    _replace(
        folder / SAFETENSORS,
        lambda to: safetensors.save_file(
            {name: value.cpu() for name, value in parameters.items()}, to, {"format": "pt"}
        ),
    )
    _replace(folder / CONFIG, lambda to: to.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n"))


def _replace(path: Path, write: Any) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, whole."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _make(values: Mapping[str, Any], parameters: Mapping[str, Tensor], backend: str) -> nn.Module:
    """A model of the configuration's kind and sizes."""
    if values.get("model_type", "reformer") != "reformer":
        raise ValueError(f'model_type must be "reformer", got {values["model_type"]!r}')
    names = values.get("architectures") or [_guess(parameters, values)]
    if names[0] not in conversion.ARCHITECTURES:
        raise ValueError(
            f"architectures must be one of {', '.join(conversion.ARCHITECTURES)}, got {names[0]!r}"
        )
    kind = conversion.ARCHITECTURES[names[0]]
    config = conversion.config_from(values, backend=backend)
    causal = {"ReformerModelWithLMHead": True, "ReformerForMaskedLM": False}.get(names[0], config.causal)
    if config.causal != causal:
        raise ValueError(f"is_decoder must be {causal} for {names[0]}, got {config.causal}")
    if kind is ReformerClassifier:
        n_labels = len(values["id2label"]) if "id2label" in values else values.get("num_labels", 2)
        return ReformerClassifier(config, n_labels, dropout=values.get("classifier_dropout"))
    return kind(config)


def _guess(parameters: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """The architecture by what is on top of the model, for checkpoints that do not say."""
    tops = {name.split(".")[0] for name in parameters}
    if "lm_head" in tops:
        return "ReformerModelWithLMHead" if values.get("is_decoder") else "ReformerForMaskedLM"
    if "classifier" in tops:
        return "ReformerForSequenceClassification"
    return "ReformerForQuestionAnswering" if "qa_outputs" in tops else "ReformerModel"


# Files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path.name} in {str(path.parent)!r}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {kind_of(values)}")
    return values


def _read_parameters(folder: Path) -> dict[str, Tensor]:
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        if (folder / (name + INDEX)).is_file():
            return _read_shards(folder / (name + INDEX))
    raise FileNotFoundError(
        f"there are no parameters in {str(folder)!r}: no {SAFETENSORS}, no {PICKLED}, and no index of shards"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists. Each is in the file that the index says, and none besides."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{index} must hold weight_map: the file of every parameter")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names a file outside its folder: {shard!r}")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} lists {shard!r}, which is not there")
        tensors = _read_tensors(index.parent / shard)
        listed = {name for name, file in places.items() if file == shard}
        if listed != tensors.keys():
            odd = ", ".join(sorted(listed ^ tensors.keys()))
            raise ValueError(f"{index} and {shard!r} disagree about which parameters are in it: {odd}")
        found |= tensors
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return dict(_safetensors().load_file(path))
        except (OSError, ValueError, _safetensors_error()) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors (which is never loaded): {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a state dict, got {kind_of(values)}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold names and tensors, got {kind_of(value)} as {name!r}")
    return values


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"the safetensors package is needed for model.safetensors ({error}); install it with: "
            "pip install safetensors"
        ) from error
    return safetensors.torch


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError

"""Checkpoint folders as transformers writes them, read and written without transformers."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from reformer_kernels._backend import Backend
from reformer_kernels._checks import kind_of
from reformer_kernels.config import check_choice
from reformer_kernels.hf import conversion
from reformer_kernels.models import (
    Reformer,
    ReformerClassifier,
    ReformerEncoderDecoder,
    ReformerLM,
    ReformerQuestionAnswering,
)
from reformer_kernels.models.files import (
    CONFIG,
    TENSORS,
    Saveable,
    check_entries,
    is_ours,
    json_bytes,
    load_model,
    read_json,
    read_tensors,
    to_bytes,
    write_folder,
)

PICKLED = "pytorch_model.bin"
INDEX = ".index.json"

OUR_CLASSES: tuple[type[Saveable], ...] = (
    Reformer,
    ReformerLM,
    ReformerClassifier,
    ReformerQuestionAnswering,
    ReformerEncoderDecoder,
)


def from_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> nn.Module:
    """Read a checkpoint folder of a transformers Reformer into one of our models, without transformers.

    The folder has config.json and model.safetensors or pytorch_model.bin, in one file or in shards with an
    index. Pickled files are read with `weights_only=True`, so they cannot run code. Folders that `Model.save`
    wrote are read too.

    The model hashes and attends as transformers does (`LSHConfig.trax`, local attention on a ring of chunks),
    with these differences:
    - the language model's logits include `lm_head.bias` where there is no `lm_head.decoder.bias`, the one
      that transformers from 5.24 on adds;
    - any length works without padding by the caller;
    - with a padding mask, positions and the chunks of local layers count tokens only
      (`position_ids=torch.arange(L)` gives transformers');
    - in evaluation `hash_seed` fixes the rotations (0 where it is null);
    - where `num_buckets` is null, a causal model has the buckets of `max_position_embeddings` tokens, others
      those of each call's length (in transformers those of the first call's);
    - dropout of the feed-forward layer comes after the activation.

    Args:
        path: the folder.
        dtype: the dtype of the parameters; None keeps the stored one.
        backend: the back end of attention: "auto", "reference", "native" or "triton". In a folder of ours,
            "auto" keeps the saved one.

    Returns:
        the model, in evaluation mode, on the CPU: a `ReformerLM` (causal, or masked), `ReformerClassifier`,
        `ReformerQuestionAnswering` or `Reformer`. The configuration's `architectures` decide, or where it
        names none the parameters. A folder of ours gives the class saved in it.

    Raises:
        FileNotFoundError: the folder or a file in it does not exist.
        ValueError: a file is damaged, the configuration is not a Reformer's or has values that are not
            accepted, or the parameters do not fit it.
    """
    check_choice("backend", backend, get_args(Backend))
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"path must be a checkpoint folder, there is none at {str(path)!r}; models on the hub can be "
            "fetched with huggingface_hub.snapshot_download"
        )
    values = read_json(folder / CONFIG)
    if is_ours(values):
        saved = load_model(folder, OUR_CLASSES, backend=None if backend == "auto" else backend)
        return saved.to(dtype).eval()
    parameters = _read_parameters(folder)
    try:
        # On the meta device even absurd sizes take no memory before they are compared with the parameters'.
        with torch.device("meta"):
            model = _make(values, parameters, backend)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if dtype is None:
        dtype = next((x.dtype for x in parameters.values() if x.is_floating_point()), torch.float32)
    conversion.check_state_dict(model, parameters)
    model.to(dtype).to_empty(device="cpu")
    conversion.load_state_dict(model, parameters)
    setattr(model, conversion.KEPT, values)
    return model.eval()


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write one of our models as a folder that transformers loads: config.json and model.safetensors.

    For a model that `from_pretrained` made, values that our configuration does not have (special tokens,
    names of labels) are written as they were read. The head's bias is written under both of its names:
    transformers before 5.24 reports `lm_head.decoder.bias` as unexpected and leaves it out of its logits.

    Args:
        model: a `Reformer`, `ReformerLM`, `ReformerClassifier` or `ReformerQuestionAnswering`.
        path: the folder, which is made if it does not exist. The two files in it are replaced, both or none.

    Raises:
        TypeError, ValueError: transformers has no such model; all reasons are listed and nothing is written.
        OSError: the folder cannot be written, for want of space or permission.
    """
    values = conversion.config_to(model)
    parameters = conversion.state_dict(model)
    values["dtype"] = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    write_folder(Path(path), {TENSORS: to_bytes(parameters), CONFIG: json_bytes(values)})


def _make(values: Mapping[str, Any], parameters: Mapping[str, Tensor], backend: str) -> nn.Module:
    """A model of the configuration's class and sizes."""
    if values.get("model_type", "reformer") != "reformer":
        raise ValueError(f'model_type must be "reformer", got {values["model_type"]!r}')
    names = values.get("architectures") or [_guess(parameters, values)]
    if names[0] not in conversion.ARCHITECTURES:
        raise ValueError(
            f"architectures must be one of {', '.join(conversion.ARCHITECTURES)}, got {names[0]!r}"
        )
    kind = conversion.ARCHITECTURES[names[0]]
    config = conversion.config_from(values, backend=backend)
    check_entries(config.to_dict(), parameters)
    causal = {"ReformerModelWithLMHead": True, "ReformerForMaskedLM": False}.get(names[0], config.causal)
    if config.causal != causal:
        raise ValueError(f"is_decoder must be {causal} for {names[0]}, got {config.causal}")
    if kind is ReformerClassifier:
        n_labels = len(values["id2label"]) if "id2label" in values else values.get("num_labels", 2)
        return ReformerClassifier(config, n_labels, dropout=values.get("classifier_dropout"))
    return kind(config)


def _guess(parameters: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """The architecture that the parameters on top of the model belong to, for folders that name none."""
    tops = {name.split(".")[0] for name in parameters}
    if "lm_head" in tops:
        return "ReformerModelWithLMHead" if values.get("is_decoder") else "ReformerForMaskedLM"
    if "classifier" in tops:
        return "ReformerForSequenceClassification"
    return "ReformerForQuestionAnswering" if "qa_outputs" in tops else "ReformerModel"


# Files


def _read_parameters(folder: Path) -> dict[str, Tensor]:
    for name in (TENSORS, PICKLED):
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        if (folder / (name + INDEX)).is_file():
            return _read_shards(folder / (name + INDEX))
    raise FileNotFoundError(
        f"there are no parameters in {str(folder)!r}: no {TENSORS}, no {PICKLED}, and no index of shards"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists; each must be in the file that the index says, and no others."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ValueError(f"{index} must hold weight_map: the file of every parameter")
    parameters: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names a file outside its folder: {shard!r}")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} lists {shard!r}, which is not there")
        tensors = _read_tensors(index.parent / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if listed != tensors.keys():
            odd = ", ".join(sorted(listed ^ tensors.keys()))
            raise ValueError(f"{index} and {shard!r} disagree about which parameters are in it: {odd}")
        parameters |= tensors
    return parameters


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
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

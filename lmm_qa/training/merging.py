"""Merge an adapter into the weight files of a checkpoint, in the memory of one layer.

The files are copied, and the tensors that the adapter changes are overwritten in the copies. Names, dtypes and the
division into files stay those of the checkpoint, so whatever reads the checkpoint reads the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lmm_qa.errors import ModelError
from lmm_qa.model import compat
from lmm_qa.model.loading import empty_model
from lmm_qa.model.rater_config import CALIBRATION_NAME, DEFECTS_NAME, FILE_NAME
from lmm_qa.model.weights import ADAPTER_WEIGHTS, load_adapter, weight_files

COPIED_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "NOTICE*")
"""Files of a checkpoint beside its weights."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MergedWeights:
    """A checkpoint and an adapter for it; the tensors that differ when they are merged."""

    def __init__(self, checkpoint: Path, adapter: Path) -> None:
        """
        Raises:
            ModelError: the adapter does not fit, or cannot be merged.
        """
        # Memory of empty tensors is not used before something is written there: they take next to none.
        base = empty_model(str(checkpoint)).to_empty(device="cpu")
        parameters = set(dict(base.named_parameters()))
        self.files: dict[Path, Any] = {file: safe_open(file, "pt") for file in weight_files(checkpoint)}
        stored = {name: file for file, tensors in self.files.items() for name in tensors.keys()}  # noqa: SIM118
        self.names = compat.parameter_names(base, stored)
        """Name of each stored tensor in the model; without those that loading converts."""
        self._stored = {parameter: (stored[name], name) for name, parameter in self.names.items()}
        model = load_adapter(base, adapter)
        check_mergeable(adapter, model)
        self._changed = dict(compat.adapted_modules(model.get_base_model()))
        self._merged: dict[str, torch.Tensor] = {}
        """Merged parameters that are not written yet: a layer's bias can be in another file than its weight."""
        self._replaced = {
            name: tensor
            for name, tensor in compat.base_tensors(load_file(adapter / ADAPTER_WEIGHTS)).items()
            if name in parameters
        }
        lost = sorted(
            name
            for name in parameters - self._stored.keys()
            if name in self._replaced or self._module(name) is not None
        )
        if lost:
            raise ModelError(
                f"{adapter} changes {lost[0]}, which {checkpoint} stores in another form: it cannot be merged. Rate "
                "with the adapter as it is"
            )

    def changed(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """Names in a weight file and new values of the tensors that the adapter changes, in float32."""
        for name in self.files[file].keys():  # noqa: SIM118
            parameter = self.names.get(name)
            module = self._module(parameter) if parameter else None
            if module is not None and parameter is not None:
                if parameter not in self._merged:
                    self._merged |= self._merge(module)
                yield name, self._merged.pop(parameter)
            elif parameter in self._replaced:
                yield name, self._replaced[parameter]

    def _module(self, parameter: str) -> str | None:
        """The changed module that a parameter belongs to."""
        parts = parameter.split(".")
        return next((path for end in range(len(parts)) if (path := ".".join(parts[:end])) in self._changed), None)

    def _merge(self, path: str) -> dict[str, torch.Tensor]:
        """The parameters of a changed module, merged by PEFT."""
        module = self._changed[path]
        base = compat.base_module(module)
        for name, parameter in base.named_parameters(path):
            parameter.data = self._value(name).to(torch.float32, copy=True)  # PEFT adds to it in place
        merged = dict(compat.merged_module(module).named_parameters(path))
        values = {name: parameter.detach().clone() for name, parameter in merged.items()}
        for parameter in (*base.parameters(), *merged.values()):
            parameter.data = parameter.data.new_empty(0)
        return values

    def _value(self, parameter: str) -> torch.Tensor:
        if parameter in self._replaced:
            return self._replaced[parameter]
        file, name = self._stored[parameter]
        value: torch.Tensor = self.files[file].get_tensor(name)
        return value


def merge_weights(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Copy a checkpoint to a new folder, with an adapter merged into its weights.

    Raises:
        ModelError: the adapter does not fit, or cannot be merged, and nothing was written; or `folder` cannot be
            written to.
    """
    merged = MergedWeights(checkpoint, adapter)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in merged.files:
            shutil.copyfile(file, folder / file.name)
            _overwrite(folder / file.name, merged.changed(file))
        # After the weights, so that a folder where this was interrupted is not taken for a model.
        for file in sorted({file for pattern in COPIED_FILES for file in checkpoint.glob(pattern) if file.is_file()}):
            if file.name not in (FILE_NAME, CALIBRATION_NAME, DEFECTS_NAME):
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        size = sum(file.stat().st_size for file in merged.files)
        raise ModelError(
            f"cannot write the merged model to {folder}, which needs {size / 1e9:.2g} GB: {error}. Remove what is "
            "there and name a folder with more space"
        ) from None


def _overwrite(file: Path, changed: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Replace tensors in a safetensors file: a JSON header after its length in 8 bytes, then the data of all tensors.

    https://huggingface.co/docs/safetensors/index#format
    """
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, value in changed:
            entry = header[name]
            start, end = entry["data_offsets"]
            data = value.to(DTYPES[entry["dtype"]]).contiguous().view(-1).view(torch.uint8)
            if data.numel() != end - start:
                raise ModelError(f"{name} has {value.numel()} merged values, and {end - start} bytes in {file.name}")
            stream.seek(8 + length + start)
            stream.write(data.numpy().data)


def check_mergeable(adapter: Path, model: Any) -> None:
    """Refuse adapters that are not a change of weights.

    Raises:
        ModelError: says why.
    """
    config = model.get_base_model().config
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{adapter} cannot be merged into quantized weights: name an unquantized backbone in {FILE_NAME}"
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type.value
        raise ModelError(
            f"an adapter of the kind {kind} cannot be merged into weights ({adapter}): rate with it as it is"
        )
    changed = {*model.targeted_module_names, *(model.active_peft_config.modules_to_save or ())}
    tied = sorted(name for name in changed if name.rpartition(".")[2] in ("lm_head", "embed_tokens"))
    if tied and config.tie_word_embeddings:
        raise ModelError(
            f"{adapter} changes {tied[0]}, whose weights are shared by input and output embeddings: merged, "
            "both would change. Rate with the adapter as it is"
        )

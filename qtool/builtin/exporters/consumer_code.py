"""What GPTQModel, ModelOpt and PEFT make of a checkpoint: each reads its files and decodes them with its own functions.

This is a program, run by ``consumer_process``: it is given a package and a socket. Files are opened with safetensors,
as these packages do, and only the rows that are asked for are looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from qtool.model.files import INDEX, WEIGHTS

_NVFP4_GROUP = 16
_SAID = ("bits", "group_size", "sym", "desc_act")


class Files:
    """The tensors of a safetensors folder; of its files the one that was read last is open.

    Args:
        directory: The folder.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / INDEX
        self._directory = directory
        self._places: Mapping[str, str] | None = None
        if index.is_file():
            self._places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        self._opened = lru_cache(1)(self._open)

    def find(self, name: str) -> Any | None:  # noqa: ANN401 - the library's slice, which has no type
        """Return a tensor of which nothing is read yet (indexing it reads), or None if there is none of that name."""
        place = WEIGHTS if self._places is None else self._places.get(name)
        file, names = self._opened(place) if place else (None, frozenset[str]())
        return file.get_slice(name) if file is not None and name in names else None

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - likewise
        """Return a tensor of which nothing is read yet."""
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found

    def _open(self, name: str) -> tuple[Any, frozenset[str]]:
        file: Any = safe_open(self._directory / name, framework="pt")
        return file, frozenset(file.keys())


class GPTQModel:
    """Rows of a weight as GPTQModel's linear of PyTorch decodes them, or its function for AWQ, by its own config."""

    def __init__(self, directory: Path) -> None:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
        from gptqmodel.quantization.config import FORMAT, QuantizeConfig
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        self._files, self._config = Files(directory), QuantizeConfig.from_pretrained(str(directory))
        self._gemm, self._first = (self._config.format == one for one in (FORMAT.GEMM, FORMAT.GPTQ))
        self._linear, self._decode_gemm = TorchLinear, dequantize_gemm
        self._to_second = convert_gptq_v1_to_v2_format_module

    def __call__(self, linear: str, stored: str, rows: slice, n_out: int) -> tuple[Float[Tensor, "out in"]]:
        """Decode some rows with scales in float32, so that nothing is rounded.

        Args:
            linear: What the model calls the linear.
            stored: What files call it.
            rows: Which outputs.
            n_out: Outputs that it has.
        """
        said = {key: self._config.dynamic_get(linear, key, getattr(self._config, key)) for key in _SAID}
        found = {
            leaf: _columns(self._files[f"{stored}.{leaf}"], rows, n_out) for leaf in ("qweight", "qzeros", "scales")
        }
        found["scales"] = found["scales"].float()
        if self._gemm:
            size = len(found["qweight"]) if said["group_size"] == -1 else said["group_size"]
            return (self._decode_gemm(*found.values(), said["bits"], size).T,)
        groups = self._files[f"{stored}.g_idx"][:]
        module = self._linear(*said.values(), len(groups), rows.stop - rows.start).eval()
        module.load_state_dict({**found, "g_idx": groups})
        if self._first:
            self._to_second(module, said["bits"], torch.int32)
        module.scales = found["scales"]
        return (module.dequantize_weight().T,)


class ModelOpt:
    """Rows of a weight as ModelOpt's quantized tensors decode them."""

    def __init__(self, directory: Path) -> None:
        from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

        self._files, self._fp8, self._nvfp4 = Files(directory), FP8QTensor, NVFP4QTensor

    def __call__(self, linear: str, stored: str, rows: slice, n_out: int) -> tuple[Float[Tensor, "out in"]]:
        """Decode some rows to float32; see ``GPTQModel``."""
        del linear, n_out
        weight: Tensor = self._files[f"{stored}.weight"][rows]
        scale, second = (self._files.find(f"{stored}.{leaf}") for leaf in ("weight_scale", "weight_scale_2"))
        if scale is None:
            raise KeyError(f"{stored}.weight_scale")
        scale = scale[rows] if scale.get_shape() else scale[...]
        if second is None:
            scale = scale.unsqueeze(-1) if scale.ndim else scale
            return (self._fp8(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale),)
        coded = self._nvfp4(torch.Size((len(weight), 2 * weight.shape[1])), torch.float32, weight)
        about = {"scale": scale, "double_scale": second[...], "block_sizes": {-1: _NVFP4_GROUP}}
        return (coded.dequantize(torch.float32, **about),)


class PEFT:
    """Factors of a correction, and the scale of their product, as PEFT loads them into the model of the config.

    The model's own weights are one zero each: PEFT moves adapters to where those are.
    """

    def __init__(self, directory: Path, folder: str, loader: str, *, trust_remote_code: bool) -> None:
        import transformers
        from peft import PeftModel

        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = getattr(transformers, loader).from_config(config, trust_remote_code=trust_remote_code)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
        self._model = PeftModel.from_pretrained(model, str(directory / folder))

    def __call__(self, linear: str) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, ""]]:
        """Return ``lora_A``, ``lora_B`` and the scale."""
        layer: Any = self._model.get_submodule(f"base_model.model.{linear}")
        (name,) = layer.active_adapters
        return layer.lora_A[name].weight, layer.lora_B[name].weight, torch.tensor(layer.scaling[name])


READERS: Mapping[str, Callable[..., Callable[..., tuple[Tensor, ...]]]] = MappingProxyType(
    {"gptqmodel": GPTQModel, "nvidia-modelopt": ModelOpt, "peft": PEFT}
)
"""The readers by the distributions that they need: opened for a checkpoint, then asked for linears."""


def _columns(whole: Any, rows: slice, n_out: int) -> Tensor:  # noqa: ANN401 - the library's slice
    """Read the columns of some outputs; words may hold several of them."""
    length = whole.get_shape()[1]
    part: Tensor = whole[:, rows.start * length // n_out : rows.stop * length // n_out]
    return part


def serve(package: str, connection: Connection) -> None:
    """Open a checkpoint with a package's code, then answer until the line is closed.

    Answers are lists of arrays in float32; words where something was raised.
    """
    torch.set_num_threads(1)
    reader: Callable[..., tuple[Tensor, ...]] | None = None
    while True:
        try:
            arguments, options = connection.recv()
        except EOFError:
            return
        answer: object
        try:
            with torch.inference_mode():
                if reader is None:
                    reader, answer = READERS[package](*arguments, **options), []
                else:
                    answer = [one.float().contiguous().numpy() for one in reader(*arguments, **options)]
        except Exception as error:  # a stranger's package may raise anything
            answer = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        connection.send(answer)


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])))

"""llama.cpp, as npm's node-llama-cpp brings it, for tests: what it computes of a GGUF file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PACKAGE = "node-llama-cpp@3.22.1"


def executed(folder: Path, file: Path, tokens: list[int], **more: object) -> dict[str, Any]:
    request = json.dumps({"tokens": tokens, "texts": [], "generate": 0, "exact": False, **more})
    command = ["node", str(SCRIPT), str(folder), str(file)]
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert all(value is not None for row in answer["logits"] for value in row), "llama.cpp computed NaN"
    return answer


def log_probabilities(logits: object) -> Tensor:
    return torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)


def divergence(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def rewritten(file: Path, name: str, stored: Callable[[Any], tuple[Any, gguf.GGMLQuantizationType | None]]) -> Path:
    """Copy a GGUF file with other tensors: ``stored`` returns the values of one, and their type if they are blocks."""
    reader, out = gguf.GGUFReader(file), file.with_name(name)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values, kind = stored(tensor)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def decoded(tensor: Any) -> tuple[Any, None]:  # noqa: ANN401 - the library's, which has no type
    """Return the values of a tensor in float32."""
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"), None


def in_float32(file: Path) -> Path:
    """Copy a GGUF file with every tensor in float32, where no product of llama.cpp's rounds its inputs."""
    return rewritten(file, "wide.gguf", decoded)

"""Running what is measured: block by block from an artifact, or whole as a consumer loads a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from qtool.engine.network import Network
from qtool.engine.stream import Stream, default_batch
from qtool.engine.subject import Subject
from qtool.errors import ResourceError

Shown = Callable[[Iterable[int], int], Iterable[int]]


class BlockExecutable:
    """Runs a subject with one block in memory at a time.

    Args:
        subject: What is executed.
        device: Where it runs.
        dtype: What it computes in.
        batch: Windows that run at once; 0 for a default.
        shown: Wraps the layers to show progress.
    """

    def __init__(
        self, subject: Subject, *, device: torch.device, dtype: torch.dtype, batch: int = 0, shown: Shown | None = None
    ) -> None:
        self.subject, self.device, self.dtype, self.batch = subject, device, dtype, batch
        self.shown: Shown = shown or (lambda layers, _: layers)

    def forward_windows(
        self, windows: Int64[Tensor, "windows tokens"]
    ) -> Iterator[tuple[slice, Float[Tensor, "batch tokens vocab"]]]:
        """Run all blocks over all windows, then yield each batch's logits."""
        network = Network(self.subject, device=self.device, dtype=self.dtype)
        batch = self.batch or default_batch(self.device, windows.shape[1])
        layers = self.subject.model.graph.dims.num_layers
        with tempfile.TemporaryDirectory() as spill:
            stream = Stream(network, windows, batch=batch, spill=Path(spill))
            for layer in self.shown(range(layers), layers):
                network.load(layer)
                stream.run(layer, keep=True)
                network.drop(layer)
            for rows in stream.batches():
                yield rows, network.logits(stream.states[rows].to(self.device))

    def whole(self) -> nn.Module:
        """Return the whole model with every block loaded."""
        return Network(self.subject, device=self.device, dtype=self.dtype).load_all()


class LoadedExecutable:
    """Runs a checkpoint as transformers loads it.

    Args:
        path: The checkpoint directory.
        device: Where it runs.
        batch: Windows that run at once; 0 for a default.
    """

    def __init__(self, path: Path, *, device: torch.device, batch: int = 0) -> None:
        self.path, self.device, self.batch = path, device, batch

    def forward_windows(
        self, windows: Int64[Tensor, "windows tokens"]
    ) -> Iterator[tuple[slice, Float[Tensor, "batch tokens vocab"]]]:
        """Yield each batch's logits."""
        model = self.whole()
        batch = self.batch or default_batch(self.device, windows.shape[1])
        for start in range(0, len(windows), batch):
            rows = slice(start, min(start + batch, len(windows)))
            with torch.no_grad():
                logits = model(windows[rows].to(self.device), use_cache=False).logits
            yield rows, logits

    def whole(self) -> nn.Module:
        """Load the checkpoint.

        Raises:
            ResourceError: transformers asks for a package that is not installed.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        text = AutoConfig.from_pretrained(self.path).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        loader = AutoModelForCausalLM if text else AutoModelForImageTextToText
        try:
            model: nn.Module = loader.from_pretrained(self.path, dtype="auto")
        except ImportError as error:
            raise ResourceError(
                "transformers needs another package to load this checkpoint",
                facts=(("reason", str(error).strip().split("\n")[0]),),
                hint="install it, or measure the quantized artifact that the checkpoint was packed from",
            ) from error
        return model.to(self.device).eval()

"""The activations between blocks: one row a window, in memory, or in a file where memory does not suffice."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from qtool.artifacts.store import disk_errors
from qtool.engine.gather import AnyStatistic, Gathering, PairedStatistic, SiteObserver, observing, sites_to_observe
from qtool.engine.guided import statistics_at
from qtool.engine.network import Inputs, Network
from qtool.model.graph import LinearSite
from qtool.model.statistics import SiteStatistics

MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Gathered:
    """What one pass of a block showed.

    Attributes:
        statistics: By site name.
        tokens: How many tokens each expert was sent; None where the block has none, or nothing reached them.
    """

    statistics: dict[str, SiteStatistics]
    tokens: Int64[Tensor, " experts"] | None = None


class Stream:
    """Hidden states of all windows at one point of the network.

    Args:
        network: Runs the blocks.
        windows: Token ids.
        batch: Windows that run at once.
        spill: Folder for a file that holds the states where they exceed half of the free memory.
    """

    def __init__(self, network: Network, windows: Int[Tensor, "windows tokens"], *, batch: int, spill: Path) -> None:
        self.network, self.windows, self.batch = network, windows, batch
        self.states: Tensor = self.allocate(spill)
        self.arguments: Inputs = network.embed(windows[:1])[1]
        self.restart()

    def batches(self) -> Iterator[slice]:
        """Yield the rows of each batch."""
        for start in range(0, len(self.windows), self.batch):
            yield slice(start, min(start + self.batch, len(self.windows)))

    def restart(self) -> None:
        """Return to the front of the first block."""
        for rows in self.batches():
            self.states[rows] = self.network.embed(self.windows[rows])[0].to(self.states.device)

    def run(self, layer: int, *, keep: bool) -> None:
        """Run a loaded block over all windows.

        Args:
            layer: Block index.
            keep: Whether the states become the block's outputs; otherwise the block only shows its inputs to observers.
        """
        arguments = self.arguments_of(layer)
        for rows in self.batches():
            hidden = self.states[rows].to(self.network.device)
            if keep:
                self.states[rows] = self.network.run(layer, hidden, arguments).to(self.states.device)
            else:
                self.network.show(layer, hidden, arguments)

    def gather(
        self,
        layer: int,
        linears: Sequence[LinearSite],
        statistics: Mapping[str, AnyStatistic],
        gathering: Gathering,
        *,
        keep: bool = False,
        exact: Stream | None = None,
        cached: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Gathered:
        """Run a loaded block over all windows and gather statistics of what its linears read.

        Args:
            layer: Block index.
            linears: Which linears.
            statistics: What to gather at each.
            gathering: What the accumulators are told.
            keep: See ``run``.
            exact: The same windows in full precision, for statistics that compare with it; ``keep`` is False then.
            cached: Statistics of ``keys``, ``values`` and ``queries`` that are gathered as well.
        """
        experts = self.network.experts.get(layer)
        if experts is not None:
            experts.reset()
        sites = sites_to_observe(linears, "all" if experts is None else experts.observed)
        wanted = {site: statistics_at(layer, site, linears, statistics, gathering) for site in sites}
        for place, needs in cached.items():
            wanted[place] = statistics_at(layer, place, (), {need: statistics[need] for need in needs}, gathering)
        with observing(self.network.sites[layer], layer, wanted, gathering) as observers:
            if exact is not None and any(isinstance(one, PairedStatistic) for one in statistics.values()):
                self._run_pairs(layer, exact, observers)
            else:
                self.run(layer, keep=keep)
            found = {name: observer.result() for name, observer in observers.items()}
        reached = experts is not None and bool(experts.routed.any())
        return Gathered(found, experts.routed.clone() if experts is not None and reached else None)

    def _run_pairs(self, layer: int, exact: Stream, observers: Mapping[str, SiteObserver]) -> None:
        """Show observers each batch in full precision first, then as it is."""
        network, arguments, sites = self.network, self.arguments_of(layer), self.network.sites[layer]
        experts = network.experts.get(layer)
        for rows in self.batches():
            routed = None if experts is None else experts.routed.clone()
            with network.exact(layer):
                for name, observer in observers.items():
                    sites[name].observer = observer.remember
                network.show(layer, exact.states[rows].to(network.device), arguments)
            if experts is not None and routed is not None:
                experts.routed = routed  # tokens are counted once
            for name, observer in observers.items():
                sites[name].observer = observer
            network.show(layer, self.states[rows].to(network.device), arguments)

    def arguments_of(self, layer: int) -> dict[str, Any]:
        """Return the keyword arguments of a block; the head behind the last has none."""
        return self.arguments[layer] if layer < len(self.arguments) else {}

    def allocate(self, spill: Path, *, host: bool = False) -> Float[Tensor, "windows tokens hidden"]:
        """Return room for states of all windows: on the device (unless ``host``), in memory, or in a file."""
        shape = (*self.windows.shape, self.network.subject.model.graph.dims.hidden)
        dtype, device = self.network.dtype, self.network.device
        size = torch.Size(shape).numel() * dtype.itemsize
        if not host and device.type == "cuda" and size < MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            return torch.empty(shape, dtype=dtype, device=device)
        if size < MEMORY_SHARE * free_memory():
            return torch.empty(shape, dtype=dtype)
        spill.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=spill) as file, disk_errors(spill):
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a page that finds no place on the disk would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def free_memory() -> int:
    """Return the bytes of memory that can be taken without swapping; a large number where that cannot be read."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def default_batch(device: torch.device, seq_len: int) -> int:
    """Return how many windows run at once: enough tokens to keep the device busy."""
    tokens = 16384 if device.type == "cuda" else 2048
    return max(1, tokens // seq_len)

"""A compressed-tensors checkpoint, and its low-rank corrections beside it as a LoRA adapter of PEFT's.

PEFT adds ``lora_B (lora_A x)`` of the input as it comes, so a correction must read the input that is not rounded: any
does where activations are not quantized, and one with ``reads=full`` where they are. The folder ``adapter`` is what
``PeftModel.from_pretrained(model, folder)`` and vLLM's ``--lora-modules`` take. PEFT looks for weights, which
compressed-tensors decodes in the first forward pass, so one comes before it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.artifacts.layout import Header
from qtool.artifacts.store import Artifact, disk_errors
from qtool.builtin.exporters.checkpoint import Sizes
from qtool.builtin.exporters.compressed_tensors import CompressedTensors
from qtool.builtin.exporters.consumer_process import consumer_reader
from qtool.builtin.exporters.refusals import quantized_weights
from qtool.builtin.exporters.shards import write_json
from qtool.engine.exporter import UNREADABLE, Exported
from qtool.engine.subject import Subject
from qtool.errors import ArtifactError, UsageError
from qtool.model.files import share
from qtool.model.graph import LinearSite

FOLDER = "adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MARK = ".adapter."
_LOADED = ("lora_A", "lora_B", "scale")


class PEFT:
    """Writes codes and scales as ``compressed-tensors`` does, and each correction as ``lora_A`` and ``lora_B``."""

    version = 1

    def __init__(self) -> None:
        self._base = CompressedTensors()

    def check(self, subject: Subject) -> None:
        """Refuse what the base cannot hold, and corrections that PEFT would compute from another input.

        Raises:
            UsageError: Names what does not fit and the nearest that does.
        """
        quantized_weights(subject)
        corrected = _corrected(subject)
        if not corrected:
            self._base.check(subject)
            raise UsageError(
                "there are no low-rank corrections to make an adapter of",
                hint="qtool pack SOURCE --to compressed-tensors",
            )
        if subject.model.graph.dims.experts > 0:
            raise UsageError(
                "PEFT has no adapters of single experts",
                facts=(("family", subject.model.family.name),),
                hint="qtool pack SOURCE --to hf, which merges them",
            )
        online = next((linear for linear in corrected if subject.plan.at(linear.reads).online), None)
        if online is not None:
            raise UsageError(
                "an adapter reads an input in front of the operators that run online",
                facts=(("first", online.name),),
                hint="qtool transform without online operators, or qtool pack SOURCE --to hf, which merges corrections",
            )
        for linear in corrected:
            activations, adapter = subject.scheme.of(linear.name).activations, subject.linear(linear).adapter
            if activations is not None and adapter is not None and adapter.reads != "full":
                raise UsageError(
                    "an adapter of PEFT's reads the input as it comes, and this correction reads the quantized one",
                    facts=(("first", linear.name), ("activations", activations)),
                    hint="qtool mitigate with --set METHOD.reads=full, or without quantized activations",
                )
        self._base.check(_without_corrections(subject))

    def write(self, subject: Subject, directory: Path) -> Exported:
        """Write checkpoint and adapter into an empty folder."""
        exported = self._base.write(_without_corrections(subject), directory)
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for linear in _corrected(subject):
            down, up = factors(subject, linear)
            ranks[linear.name] = len(down)
            tensors |= {f"{_key(linear)}.lora_A.weight": down, f"{_key(linear)}.lora_B.weight": up}
        with disk_errors(directory):
            (directory / FOLDER).mkdir()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FOLDER / WEIGHTS)
            share(directory / FOLDER / WEIGHTS)
        write_json(directory / FOLDER / CONFIG, adapter_config(ranks))
        size = sum(tensor.nbytes for tensor in tensors.values())
        details = dict(exported.details)
        sizes = exported.details["bytes"]
        details["bytes"] = vars(Sizes.of({**sizes["parts"], "adapters": size}, sizes["model"] + size, sizes["ends"]))
        details["adapter"] = {"folder": FOLDER, "largest rank": max(ranks.values())}
        of_head = subject.model.family.head in ranks
        return Exported(_consumers(exported.consumers, max(ranks.values()), of_head=of_head), details)

    def verify(self, subject: Subject, directory: Path) -> str:
        """Verify the base as its exporter does, and compare every factor bit for bit.

        Where PEFT is installed it loads the adapter, and factors and scale are those that it has then.

        Raises:
            ArtifactError: Names the first weight or factor that differs.
        """
        base = self._base.verify(_without_corrections(subject), directory)
        try:
            stored = load_file(directory / FOLDER / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ArtifactError("the adapter cannot be read back", facts=(("reason", error),)) from error
        corrected, model = _corrected(subject), subject.model
        wanted = {f"{_key(linear)}.lora_{side}.weight" for linear in corrected for side in "AB"}
        if stored.keys() != wanted:
            odd = sorted(stored.keys() ^ wanted)
            raise ArtifactError("the adapter has other tensors than the corrections", facts=(("first", odd[0]),))
        about: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
        with consumer_reader("peft", directory, FOLDER, model.family.loader, **about) as theirs:
            for linear in corrected:
                down, up = factors(subject, linear)
                for side, ours in (("A", down), ("B", up)):
                    read = stored[f"{_key(linear)}.lora_{side}.weight"]
                    if read.dtype != ours.dtype or not torch.equal(read, ours):
                        raise _difference(linear, f"lora_{side}")
                loaded = [down.float(), up.float(), torch.tensor(1.0)]
                for part, one, ours in zip(_LOADED, theirs.ask(linear.name), loaded, strict=True) if theirs.ask else ():
                    if not torch.equal(one, ours):
                        raise _difference(linear, f"{part}, as PEFT loads it")
        return f"{base}; the adapter with {theirs.said}"


def _difference(linear: LinearSite, part: str) -> ArtifactError:
    return ArtifactError(
        f"the correction of `{linear.name}` that was written is not the one that was made",
        facts=(("part", part),),
        hint="pack again; if it happens again, report it",
    )


def factors(subject: Subject, linear: LinearSite) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return the factors of a linear's correction: as stored, or in float32 where they are codes with scales.

    Raises:
        LookupError: It has none.
    """
    adapter = subject.linear(linear).adapter
    if adapter is None:
        raise LookupError(linear.name)
    coded = adapter.down_scale is not None or adapter.up_scale is not None
    dtype = torch.float32 if coded else torch.promote_types(adapter.down.dtype, adapter.up.dtype)
    return adapter.factors(dtype)


def adapter_config(ranks: dict[str, int]) -> dict[str, Any]:
    """Return ``adapter_config.json``: factors as they are, without a scale.

    Args:
        ranks: Rank of the correction of each linear, by its name.
    """
    largest = max(ranks.values())
    apart = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": apart,
        "alpha_pattern": apart,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


class _Bare(Artifact):
    """An artifact without its corrections."""

    @cached_property
    def header(self) -> Header:
        """The table of contents of all else."""
        whole = super().header
        return Header(whole.metadata, {name: slot for name, slot in whole.slots.items() if _MARK not in name})


def _without_corrections(subject: Subject) -> Subject:
    if subject.quantized is None:
        return subject
    return replace(subject, quantized=_Bare(subject.quantized.path, subject.quantized.manifest))


def _corrected(subject: Subject) -> list[LinearSite]:
    """Return the linears that have a correction."""
    slots = subject.quantized.header.slots if subject.quantized is not None else ()
    names = {name.partition(_MARK)[0] for name in slots if _MARK in name}
    return [linear for linear in subject.coded if linear.name in names]


def _key(linear: LinearSite) -> str:
    return f"base_model.model.{linear.name}"


def _consumers(base: Any, rank: int, *, of_head: bool) -> dict[str, str]:  # noqa: ANN401 - a mapping of words
    """Return what consumers execute, of the base and of the adapter."""
    unknown = "; whether it takes that of the head is not known" if of_head else ""
    lost = f"{UNREADABLE} without the adapter, which from_pretrained leaves out"
    return {
        "peft": f"{base['transformers']}; the adapter in float32",
        "transformers": f"{lost}; with PeftModel.from_pretrained(model, FOLDER/{FOLDER}) after a forward pass as peft",
        "vllm": f"{base['vllm']}; the adapter with --enable-lora --max-lora-rank {rank} and a request that names it"
        + unknown,
    }

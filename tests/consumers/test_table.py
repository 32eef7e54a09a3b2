"""Every rule on consumers is reached by some checkpoint, no two of them answer one case, and unknown stays unknown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from qtool.consumers import table as module
from qtool.consumers.case import Case
from qtool.consumers.config import ONLINE, cases_of
from qtool.consumers.table import PARTS, VERDICTS, Rule, table
from qtool.engine.exporter import UNREADABLE
from tests.consumers.known import (
    GPTQ,
    Config,
    compressed,
)

RULES = table()
METHODS = ("compressed-tensors", "gptq", "awq", "modelopt")
SEVERAL = ({"apart": True}, {"beside": True}, {"apart": True, "beside": True})
FIELDS = {field.name for field in fields(Case)}


def microscaled() -> Iterator[Config]:
    """Yield MXFP8 and MXFP6, each without and with quantized inputs."""
    for given in ("", "float8-sym-group32-dynamic"):
        yield compressed("mxfp8-quantized", "float8-sym-group32-static", given)
        yield compressed("mxfp6-pack-quantized", "float6-sym-group32-static", given)


def putting_out() -> Iterator[Config]:
    """Yield linears whose outputs are quantized, with static INT8 inputs and without."""
    ways = ("int8-sym-tensor-static", "int8-asym-tensor-static", "int8-sym-token-dynamic", "float8-sym-tensor-static")
    ways = (*ways, "float4-sym-tensor_group16-local")
    packed = [f"int{bits}-{sign}-group32-static" for bits in (3, 4, 8) for sign in ("sym", "asym")]
    kinds = [("pack-quantized", one) for one in packed]
    kinds += [("int-quantized", f"int8-sym-{how}-static") for how in ("channel", "tensor")]
    kinds += [("float-quantized", "float8-sym-channel-static")]
    for (layout, weights), way in product(kinds, ways):
        for given in ("", "int8-sym-tensor-static", "int8-asym-tensor-static"):
            yield compressed(layout, weights, given if layout != "float-quantized" else "", outputs=way)


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
        "int8-asym-tensor-static",
        "float4-sym-tensor_group16-local",
        "int4-asym-group32-dynamic",
        "float8-sym-token-dynamic",
    )
    for sign, cached in product(signs, caches):
        yield compressed("pack-quantized", f"int4-{sign}-group96-static", "", cached)
    bytewise = ("int8-sym-channel-static", "int8-sym-tensor-static", "int4-sym-channel-static")
    for weights, given in product(bytewise, inputs[1:]):
        yield compressed("int-quantized", weights, given)
    ways = ("token-dynamic", "tensor-dynamic", "tensor-static", "group128-dynamic")
    floats = ("", *(f"float8-sym-{how}" for how in ways))
    for how, given in product(("channel", "tensor", "block", "group128"), floats):
        yield compressed("float-quantized", f"float8-sym-{how}-static", given)
    fitted = [one for one in floats if one.endswith("dynamic")]
    yield compressed("naive-quantized", "float8-sym-channel-static")
    for given in ("", "float4-sym-tensor_group16-local"):
        yield compressed("nvfp4-pack-quantized", "float4-sym-tensor_group16-static", given)
    for given in ("", "float4-sym-group32-dynamic", "float8-sym-group64-dynamic", *fitted):
        yield compressed("mxfp4-pack-quantized", "float4-sym-group32-static", given)
    yield compressed("mxfp6-pack-quantized", "float6-sym-group32-static", "float8-sym-token-dynamic")
    yield from (
        compressed("pack-quantized", *both) for both in product((*integers, "int4-sym-group128-static"), fitted)
    )
    yield from microscaled()
    yield from putting_out()
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
    fitted = [case for case in plain if case.method == "compressed-tensors" and case.inputs == "dynamic"]
    made += [replace(case, input_scale="bf16", dtype="float16") for case in fitted]
    made += [replace(case, dtype="float16") for case in plain if case.method == "awq"]
    made += [replace(case, experts=True, alone=True) for case in plain if case.method == "compressed-tensors"]
    made += [replace(case, bits=4) for case in plain if case.method == "dense"]
    made += [replace(case, decoded=True) for case in plain if case.layout == "pack-quantized" and not case.symmetric]
    made += [
        replace(case, online=kind, biased=biased) for case in plain for kind, biased in product(ONLINE, (True, False))
    ]
    made += [replace(case, queries=True) for case in plain if case.cache != "none" and case.method != "modelopt"]
    made += [replace(case, turned=kind) for case in plain if case.method == "compressed-tensors" for kind in ONLINE]
    made += [replace(case, **alike) for case in plain if case.method in METHODS for alike in SEVERAL]
    alone = [case for case in plain if case.method == "compressed-tensors" and case.inputs == case.cache == "none"]
    made += [replace(case, adapter=True) for case in alone]
    made += [replace(case, head=how) for case in alone for how in ("named", "unnamed")]
    integers = ("int5-sym-channel-static", "int2-sym-group64-static")
    embeddings = [*alone, *(case for one in integers for case in cases_of(compressed("pack-quantized", one)))]
    made += [
        replace(case, embedding=how, decoded=decoded)
        for case in embeddings
        for how, decoded in product(("class", "named"), (True, False))
    ]
    made += [replace(case, inputs=how) for case in plain if case.layout == "FP8" for how in ("dynamic", "static")]
    made += [
        Case("gguf", kind, bits=4)
        for kind in (
            "F16",
            "BF16",
            "Q4_0",
            "Q4_1",
            "Q8_0",
            "MXFP4",
            "NVFP4",
            "Q4_K",
            "IQ4_NL",
            "IQ3_S",
            "TQ1_0",
            "Q8_K",
        )
    ]
    return tuple(dict.fromkeys(made))


def test_every_rule_is_reached_and_every_case_has_one_rule_a_part() -> None:
    reached = set()
    for case in cases():
        facts = case.facts()
        found = [rule for rule in RULES if rule.holds(facts, rule.devices[0])]
        for device in dict.fromkeys(device for rule in found for device in rule.devices):
            parts = [(rule.source.consumer, rule.part) for rule in found if device in rule.devices]
            assert len(set(parts)) == len(parts), (case, device, parts)
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
    if rule.part in PARTS and rule.part not in ("scales", "range", "inputs"):
        assert rule.verdict in VERDICTS
        assert rule.verdict != "unknown"
        assert (rule.verdict == "refuses") <= rule.says.startswith(("refused: ", UNREADABLE))
        assert (rule.says == "") <= (rule.part in ("experts", "groups", "head", "embedding"))
    else:
        assert not rule.verdict
    assert rule.part == "linears" or rule.says.startswith((";", "refused: ", UNREADABLE)) or not rule.says
    assert (rule.part == "kernel") == bool(rule.kernel)
    assert rule.source.known == "code read" or rule.source.known.startswith("run on a")

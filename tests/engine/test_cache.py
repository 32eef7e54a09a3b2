"""Keys with scales of channels over groups of tokens: the formulas by loops, and no difference token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.engine.attention import CHILD, KVPath, executed_attention
from qtool.engine.cache import CacheRounding
from qtool.engine.network import Network
from qtool.engine.subject import Subject
from qtool.errors import SchemeError
from qtool.model.plan import Plan, SitePlan
from qtool.numerics.operators import Affine, Diag
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme
from qtool.steps.schemes import read_scheme
from qtool.testing import TinyModel, tiny_model

HEADS, KV, DIM, TOKENS = 4, 2, 8, 11
KIVI = "keys=int2-asym-channel-g4-real-sfp32,values=int2-asym-g4-real-sfp32"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.discover()


def scheme_of(text: str, plugins: Plugins) -> ModelScheme:
    return read_scheme("", {"kv": text}, plugins)


def rounding_of(text: str, plugins: Plugins) -> CacheRounding:
    scheme = scheme_of(text, plugins)
    found = CacheRounding.of(scheme, plugins.format)
    assert found is not None
    return found


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, n, TOKENS, DIM, generator=generator) for n in (HEADS, KV, KV))
    return query, key + torch.linspace(-3, 3, DIM), value + 0.5


def kivi(values: list[float], bits: int) -> list[float]:
    """Round a group by KIVI's formulas: ``q = ⌊(x - min) / s⌉``, ``x̂ = q s + min``, ``s = (max - min) / (2^b - 1)``."""
    least, most = min(values), max(values)
    step = (most - least) / (2**bits - 1)
    return [min(max(round((x - least) / step), 0), 2**bits - 1) * step + least for x in values]


def oracle(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
    """Attention of every query alone, over keys and values that are rounded number by number."""
    result = torch.zeros(query.shape[0], TOKENS, HEADS, DIM, dtype=torch.float64)
    for b in range(query.shape[0]):
        for head in range(HEADS):
            k, v = key[b, head // 2].double().tolist(), value[b, head // 2].double().tolist()
            values = [[x for start in (0, 4) for x in kivi(row[start : start + 4], 2)] for row in v]
            for t in range(TOKENS):
                seen = [list(row) for row in k[: t + 1]]
                for first in range(0, (t + 1) // tokens * tokens, tokens):
                    for channel in range(DIM):
                        column = kivi([k[first + i][channel] for i in range(tokens)], 2)
                        for i in range(tokens):
                            seen[first + i][channel] = column[i]
                scores = [
                    math.exp(sum(x * y for x, y in zip(query[b, head, t].tolist(), row, strict=True)) / DIM**0.5)
                    for row in seen
                ]
                for j, score in enumerate(scores):
                    result[b, t, head] += score / sum(scores) * torch.tensor(values[j], dtype=torch.float64)
    return result


class Attention(nn.Module):
    """What transformers' function of attention reads of a module."""

    is_causal = True
    num_key_value_groups = HEADS // KV

    def __init__(self, path: KVPath) -> None:
        super().__init__()
        self.add_module(CHILD, path)


@pytest.mark.parametrize("softcap", [None, 1e6])
@pytest.mark.parametrize("masked", ["no", "boolean", "added"])
def test_attention_is_that_of_the_formulas(plugins: Plugins, softcap: float | None, masked: str) -> None:
    """A softcap far above all scores changes nothing, and goes through the other implementation."""
    query, key, value = states()
    factors = torch.linspace(0.5, 2, DIM)
    module = Attention(KVPath((Diag(factors),), rounding_of(KIVI, plugins)))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    mask = {"no": None, "boolean": causal, "added": added}[masked]
    received, _ = executed_attention(module, query, key, value, mask, scaling=DIM**-0.5, softcap=softcap)
    expected = oracle(query / factors, key * factors, value, 4)
    torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-4)
    exact, _ = executed_attention(Attention(KVPath((), None)), query, key, value, None, scaling=DIM**-0.5)
    assert (exact.double() - expected).abs().max() > 0.05


def test_a_group_that_is_not_full_stays_as_it_is(plugins: Plugins) -> None:
    rounding = rounding_of("keys=int2-asym-channel-g4,values=none", plugins)
    _, key, value = states()
    for past in range(1, TOKENS + 1):
        seen, same, mask = rounding.by_group(key[:, :, :past], value[:, :, :past], None, queries=1)
        full = past // 4 * 4
        assert mask is None
        assert torch.equal(same, value[:, :, :past])
        assert torch.equal(seen[:, :, full:], key[:, :, full:past])
        fmt = plugins.format("int2")
        for first in range(0, full, 4):
            for channel in range(DIM):
                group = key[0, 1, first : first + 4, channel]
                scheme = rounding_of("int2-asym-token-head", plugins).keys
                assert scheme is not None
                fitted = fmt.fit(group, replace(scheme.grid.parts[0].scheme, strategy="group", group_size=4))
                assert torch.equal(seen[0, 1, first : first + 4, channel], fmt.round(group, fitted))


def test_token_head_is_a_scale_for_each_head_and_token(plugins: Plugins) -> None:
    rounding = rounding_of("int4-asym-token-head", plugins)
    _, key, value = states()
    first, second = rounding.by_token(key, value)
    fmt, scheme = plugins.format("int4"), scheme_of("int4-asym-token-head", plugins).keys
    assert scheme is not None
    for received, x in ((first, key), (second, value)):
        for head in range(KV):
            for token in range(TOKENS):
                row = x[1, head, token]
                assert torch.equal(received[1, head, token], fmt.round(row, fmt.fit(row, scheme)))
    assert rounding.by_group(first, second, None, queries=3) == (first, second, None)


def test_head_is_a_scale_for_each_head_and_all_tokens(plugins: Plugins) -> None:
    """Until it is calibrated, of those of a window, so that no window sees which others run beside it."""
    rounding = rounding_of("int8-head-sfp32-static", plugins)
    _, key, value = states()
    received = rounding.by_token(key, value)
    for found, x in zip(received, (key, value), strict=True):
        for window in range(2):
            for head in range(KV):
                own = x[window, head]
                scale = float(own.abs().max()) / 127
                torch.testing.assert_close(found[window, head], (own / scale).round().clamp(-128, 127) * scale)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def tiny(request: pytest.FixtureRequest, plugins: Plugins) -> Iterator[TinyModel]:
    windows = {"sliding_window": 64} if request.param in ("gemma2", "gpt_oss") else {}
    with tiny_model(request.param, plugins=plugins, **windows) as model:
        yield model


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_token_by_token_equals_all_at_once(tiny: TinyModel, plugins: Plugins, bits: int) -> None:
    """Also with keys behind R3, and with several tokens at once before and behind the first group that is full."""
    subject = tiny.subject
    dims = subject.model.graph.dims
    matrix = torch.randn(dims.head_dim, dims.head_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned = SitePlan((Affine.from_matrix(matrix + 4 * torch.eye(dims.head_dim, dtype=torch.float64)),), 0)
    has_site = "layers.0.qk_post" in subject.model.graph.sites
    plan = Plan({f"layers.{i}.qk_post": turned for i in range(dims.num_layers)}) if has_site else Plan()
    kv = f"keys=int{bits}-asym-channel-g4-real,values=int{bits}-asym-g4"
    scheme = scheme_of(kv, plugins)
    ids = torch.randint(0, 256, (2, 14), generator=torch.Generator().manual_seed(1))
    whole, steps = decoded(replace(subject, plan=plan, scheme=scheme), ids)
    # Ends of a range are found in float32, where the last bit of a sum may fall either way.
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-6)
    keys_alone = decoded(replace(subject, plan=plan, scheme=replace(scheme, kv=scheme.values)), ids)[0]
    exact = decoded(replace(subject, plan=plan), ids)[0]
    assert (whole - keys_alone).abs().max() > 1e-4
    if bits == 8:
        assert (whole - exact).abs().max() < 0.1


def decoded(subject: Subject, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all tokens at once, and in pieces with a cache."""
    module: Any = Network(subject, device=torch.device("cpu"), dtype=torch.float64).load_all()
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
        steps, cache = [], None
        for piece in (ids[:, :3], ids[:, 3:9], *ids[:, 9:].split(1, dim=1)):
            if piece.shape[1]:
                out = module(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
    return whole, torch.cat(steps, 1)


def test_a_cache_that_may_have_dropped_tokens_is_refused(plugins: Plugins) -> None:
    with tiny_model("mistral", plugins=plugins, sliding_window=6) as model:
        subject = replace(model.subject, scheme=scheme_of("keys=int4-asym-channel-g4,values=none", plugins))
        with pytest.raises(SchemeError, match="need a cache that holds all tokens") as refused:
            decoded(subject, torch.arange(14)[None])
        assert refused.value.hint == "--kv int4-asym-token-head"
        by_token = replace(model.subject, scheme=scheme_of("int4-asym-token-head", plugins))
        whole, steps = decoded(by_token, torch.arange(14)[None])
        torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)


def test_gradients_pass_through_rounded_keys(plugins: Plugins) -> None:
    query, key, value = states()
    key.requires_grad_()
    module = Attention(KVPath((), rounding_of(KIVI, plugins)))
    executed_attention(module, query, key, value, None, scaling=DIM**-0.5)[0].sum().backward()
    assert key.grad is not None
    assert bool((key.grad.abs().amax((0, 1, 3))[:-1] > 0).all()), "tokens of full groups have gradients too"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("int4-asym-channel-g32", "means nothing for values",
         "keys=int4-asym-channel-g32-sbf16,values=int4-asym-g32-sbf16"),
        ("keys=int2-channel,values=int4-asym-token-head", "without a number of tokens",
         "keys=int2-sym-channel-g32-sbf16,values=int4-asym-token-head-sbf16"),
        ("keys=fp8-token", "`token` means nothing for kv", "keys=fp8-sym-token-head-sfp32,values=none"),
        ("keys=int8,keys=int4", "cannot read the scheme of a cache", ""),
        ("heads=int8", "cannot read the scheme of a cache", ""),
        ("queries=int4-channel-g32,keys=int8", "means nothing for values and queries",
         "queries=int4-sym-g32-sbf16,keys=int8-sym-token-head-sbf16,values=none"),
        ("keys=int4-o6,values=none", "kv have no outlier columns", "keys=int4-sym-token-head-sbf16,values=none"),
        ("keys=int8-tensor-static,values=int4-channel", "means nothing for values",
         "keys=int8-sym-tensor-sbf16-static,values=int4-sym-token-head-sbf16"),
    ],
)  # fmt: skip
def test_bad_schemes_of_a_cache_name_the_nearest(plugins: Plugins, text: str, message: str, hint: str) -> None:
    with pytest.raises(SchemeError, match=message) as refused:
        scheme_of(text, plugins)
    nearest = refused.value.hint.partition("--kv ")[2]
    if hint:
        assert nearest == hint
    scheme_of(nearest, plugins).check()


@pytest.mark.parametrize(
    "text",
    [
        "keys=fp8-sym-head-sfp32-static,values=int8-asym-token-head-sbf16",
        "int4-asym-token-head-sfp16-c0.95", "keys=int2-asym-channel-g32-real-sfp16,values=int2-asym-g16-sbf16",
        "keys=int2-asym-channel-g32-offset-sfp16,values=int2-asym-g16-offset-sbf16",
        "keys=fp8-sym-channel-g16-sfp32,values=none", "keys=none,values=int6-sym-token-head-sbf16",
        "fp8-sym-tensor-sfp32-static", "keys=none,values=int8-sym-tensor-sfp32-c0.9-static",
    ],
)  # fmt: skip
def test_a_cache_is_written_as_it_is_read(plugins: Plugins, text: str) -> None:
    scheme = scheme_of(text, plugins)
    assert ModelScheme.from_json(scheme.to_json()) == scheme
    assert scheme_of(str(scheme.kv), plugins).kv == scheme.kv
    words = text.replace("keys=", "").replace("values=", "").split(",")
    assert [str(one or "none") for one in (scheme.keys, scheme.values)][: len(words)] == words


def test_queries_are_written_as_they_are_read(plugins: Plugins) -> None:
    text = "queries=fp8-sym-head-sfp32-static,keys=int4-sym-token-head-sbf16,values=none"
    scheme = scheme_of(text, plugins)
    assert str(scheme.kv) == text
    assert ModelScheme.from_json(scheme.to_json()) == scheme
    assert (scheme.queries, scheme.every("kv")) == (scheme.every("kv")[1], (scheme.keys, scheme.queries))
    assert "queries" not in scheme_of("keys=int8,values=none", plugins).to_json()["kv"]


def test_the_same_for_both_is_one_scheme(plugins: Plugins) -> None:
    assert scheme_of("keys=int8,values=int8", plugins).kv == scheme_of("int8", plugins).kv
    assert scheme_of("keys=none,values=none", plugins).kv is None

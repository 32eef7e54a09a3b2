"""check_family notices what is wrong with a description, and says it in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from qtool.builtin.families.deepseek import DEEPSEEK
from qtool.builtin.families.gemma import GEMMA
from qtool.builtin.families.gemma2 import GEMMA2
from qtool.builtin.families.gpt_neox import GPT_NEOX
from qtool.builtin.families.gpt_oss import GPT_OSS
from qtool.builtin.families.llama import LLAMA
from qtool.builtin.families.llama4_text import LLAMA4_TEXT
from qtool.builtin.families.olmo2 import OLMO2
from qtool.builtin.families.phi3 import PHI3
from qtool.builtin.families.qwen2_moe import QWEN2_MOE
from qtool.builtin.families.stablelm import STABLELM
from qtool.model.family import LLAMA_LIKE_NORMS, Experts, Family, Linear, Norm, Part
from qtool.testing import CheckError, check_family, double_precision, family_configs


def changed(family: Family, module: str, **changes: object) -> Family:
    """Return a family with another description of one linear."""
    assert module in {linear.module for linear in family.linears}
    linears = tuple(replace(one, **changes) if one.module == module else one for one in family.linears)
    return replace(family, linears=linears)


def changed_expert(family: Family, module: str, **changes: object) -> Family:
    assert isinstance(family.experts, Experts)
    linears = tuple(replace(one, **changes) if one.module == module else one for one in family.experts.linears)
    return replace(family, experts=replace(family.experts, linears=linears))


def without(family: Family, module: str) -> Family:
    return replace(family, linears=tuple(one for one in family.linears if one.module != module))


NEOX_ROWS = (Part("head_dim", writes="vo"), Part("head_dim"), Part("head_dim"))
PHI3_ROWS = (Part("intermediate", writes="up_down"), Part("intermediate"))
WRONG: Mapping[str, tuple[Family, str]] = {
    "a linear is left out": (without(LLAMA, "mlp.gate_proj"), r"gate_proj"),
    "a linear that no model has": (
        replace(LLAMA, linears=(*LLAMA.linears, Linear("mlp.third", reads="mlp_in"))),
        r"mlp\.third",
    ),
    "what writes the residual is not said": (changed(LLAMA, "self_attn.o_proj", writes=""), "at `residual`"),
    "gate for up": (
        changed(changed(LLAMA, "mlp.up_proj", writes=""), "mlp.gate_proj", writes="up_down"),
        "at `up_down` is not exact",
    ),
    "norms in the place of each other": (
        replace(LLAMA, norms={"attn_in": LLAMA_LIKE_NORMS["mlp_in"], "mlp_in": LLAMA_LIKE_NORMS["attn_in"]}),
        "folding norms is not exact",
    ),
    "a norm without its offset": (
        replace(GEMMA, norms=LLAMA_LIKE_NORMS, final_norm=Norm("model.norm")),
        "folding norms is not exact",
    ),
    "sandwich norms forgotten": (
        changed(changed(GEMMA2, "mlp.down_proj", writes_through=""), "self_attn.o_proj", writes_through=""),
        "at `residual` is not exact",
    ),
    "the output norm for the input norm": (
        replace(GEMMA2, norms={**GEMMA2.norms, "mlp_in": Norm("post_attention_layernorm", offset=1.0)}),
        "not exact",
    ),
    "soft caps forgotten": (replace(GEMMA2, logits="free"), "`shift` at `qk_post` is not exact"),
    "sinks forgotten": (replace(GPT_OSS, logits="capped"), "`shift` at `vo` is not exact"),
    "a norm in front that lies behind": (
        replace(OLMO2, norms={"attn_in": Norm("post_attention_layernorm"), "mlp_in": None}),
        "not exact",
    ),
    "a layer norm taken for one that keeps the mean": (
        replace(
            STABLELM,
            norms={name: Norm(norm.module) for name, norm in STABLELM.norms.items() if norm is not None},
            final_norm=Norm("model.norm"),
        ),
        "not exact",
    ),
    "rows in another order": (changed(GPT_NEOX, "attention.query_key_value", parts=NEOX_ROWS), "at `vo` is not exact"),
    "rows not head by head": (
        changed(GPT_NEOX, "attention.query_key_value", per_head=False),
        "query_key_value.*expected: 24 x 48; received: 144 x 48",
    ),
    "gate and up in the other order": (
        changed(PHI3, "mlp.gate_up_proj", parts=PHI3_ROWS),
        "at `up_down` is not exact",
    ),
    "the router left out": (without(QWEN2_MOE, "mlp.gate"), r"mlp\.gate"),
    "the shared expert's gate left out": (without(QWEN2_MOE, "mlp.shared_expert_gate"), "shared_expert_gate"),
    "an activation taken for a product": (
        changed_expert(GPT_OSS, "gate_up_proj", parts=(Part("intermediate"), Part("intermediate", writes="up_down"))),
        "at `up_down` is not exact",
    ),
    "an expert's width": (
        replace(LLAMA4_TEXT, sizes={**LLAMA4_TEXT.sizes, "experts.up_down": "intermediate_size_mlp"}),
        "down_proj.*expected: 24 x 28; received: 24 x 40",
    ),
    "the latent's norm taken for one of the residual": (
        replace(DEEPSEEK, norms={**DEEPSEEK.norms, "kv_b_in": Norm("self_attn.kv_a_layernorm")}),
        "does not fit the values",
    ),
    "the size of a value head": (
        replace(DEEPSEEK, sizes={**DEEPSEEK.sizes, "value_dim": "qk_rope_head_dim"}),
        "kv_b_proj.*expected: 48 x 8; received: 64 x 8",
    ),
}


@pytest.mark.parametrize(("family", "match"), WRONG.values(), ids=WRONG)
def test_a_wrong_description(family: Family, match: str) -> None:
    with pytest.raises(CheckError, match=match) as told:
        check_family(family, next(family_configs(family)))
    assert family.name in str(told.value)
    assert "\n" not in str(told.value)


class TestDoublePrecision:
    """Modules of transformers compute in float64 inside, whatever they ask for; nothing else is touched."""

    @pytest.fixture
    def norm(self) -> nn.Module:
        norm = GemmaRMSNorm(8).double().requires_grad_(False)
        norm.weight.data = torch.linspace(-0.5, 0.7, 8, dtype=torch.float64)
        return norm

    def test_a_norm_that_asks_for_float32(self, norm: nn.Module) -> None:
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double() / 3
        exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
        assert float((norm(x) - exact).abs().max()) > 1e-9
        with double_precision():
            assert float((norm(x) - exact).abs().max()) < 1e-14
            with double_precision():
                assert float((norm(x) - exact).abs().max()) < 1e-14
            assert float((norm(x) - exact).abs().max()) < 1e-14
        assert float((norm(x) - exact).abs().max()) > 1e-9

    def test_other_code_gets_what_it_asks_for(self) -> None:
        x = torch.ones(3, dtype=torch.float64)
        with double_precision():
            assert x.float().dtype == torch.float32
            assert x.to(torch.float32).dtype == torch.float32
            assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.float32

    def test_float32_stays_float32(self, norm: nn.Module) -> None:
        with double_precision():
            assert norm.float()(torch.ones(2, 8)).dtype == torch.float32

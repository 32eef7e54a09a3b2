"""How much a token counts: by hand, in windows, and where there is nothing to weigh."""

from __future__ import annotations

import pytest
import torch

from qtool.errors import UsageError
from qtool.numerics.token_weights import TokenWeight, parse_token_weight


def test_each_rule_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    assert TokenWeight().scales(x) is None
    inverse = TokenWeight("inverse-norm", 1.0).scales(x)
    assert inverse is not None
    torch.testing.assert_close(inverse, torch.tensor([1 / 5, 1.0, 1 / 10]))
    root = TokenWeight("inverse-norm", 0.5).scales(x)
    assert root is not None
    torch.testing.assert_close(root, torch.tensor([5**-0.5, 1.0, 10**-0.5]))
    clipped = TokenWeight("clip", 1.5).scales(x)
    assert clipped is not None
    torch.testing.assert_close(clipped, torch.tensor([1.0, 1.0, 7.5 / 10]))


def test_rotations_change_no_weight() -> None:
    x = torch.randn(50, 16, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    for rule in (TokenWeight("inverse-norm"), TokenWeight("clip", 1.1)):
        left, right = rule.scales(x), rule.scales(x @ q)
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right)


def test_each_window_has_its_own_median() -> None:
    rule = TokenWeight("clip", 1.0)
    quiet, loud = torch.full((3, 1), 1.0), torch.full((3, 1), 100.0)
    loud[2] = 200.0
    together = rule.scales(torch.cat([quiet, loud]), window=3)
    apart = [rule.scales(one, window=3) for one in (quiet, loud)]
    assert together is not None
    assert torch.equal(together, torch.cat([one for one in apart if one is not None]))
    assert together.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("rule", ["inverse-norm", "inverse-norm:0.5", "clip", "clip:0.5"])
def test_a_token_of_zeros_weighs_nothing_against_others(rule: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]])
    scales = parse_token_weight(rule).scales(x)
    assert scales is not None
    assert torch.isfinite(scales).all()
    assert float(scales[0]) <= 1.0
    assert (scales[1:] > 0).all()


@pytest.mark.parametrize(
    ("text", "rule", "parameter"),
    [
        ("uniform", "uniform", 1.0),
        ("inverse-norm", "inverse-norm", 1.0),
        ("inverse-norm:0.5", "inverse-norm", 0.5),
        ("clip", "clip", 3.0),
        ("clip:2.5", "clip", 2.5),
    ],
)
def test_written_rules(text: str, rule: str, parameter: float) -> None:
    read = parse_token_weight(text)
    assert (read.rule, read.parameter) == (rule, parameter)
    assert parse_token_weight(str(read)) == read


@pytest.mark.parametrize(
    "text", ["", "norm", "inverse-norm:0", "inverse-norm:-1", "clip:x", "clip:inf", "clip:nan", "uniform:2", "norm:1"]
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the token weight") as refused:
        parse_token_weight(text)
    assert "uniform, inverse-norm, clip" in str(refused.value)


class TestSites:
    def test_a_site_has_its_own_rule(self) -> None:
        weight = parse_token_weight("inverse-norm, up_down=uniform,attn_in=clip")
        assert weight.at("up_down") == TokenWeight()
        assert weight.at("experts.3.up_down") == TokenWeight()
        assert weight.at("attn_in") == TokenWeight("clip", 3.0)
        assert weight.at("o_in") == TokenWeight("inverse-norm")
        assert weight.rules == {"inverse-norm", "uniform", "clip"}

    @pytest.mark.parametrize(
        ("text", "printed"),
        [
            ("inverse-norm,up_down=uniform", "inverse-norm:1,up_down=uniform"),
            ("gradient,up_down=clip:2,attn_in=uniform", "gradient,attn_in=uniform,up_down=clip:2"),
            ("inverse-norm:1,attn_in=inverse-norm,o_in=gradient", "inverse-norm:1,o_in=gradient"),
            ("uniform,up_down=uniform", "uniform"),
        ],
    )
    def test_the_same_rule_has_one_name(self, text: str, printed: str) -> None:
        read = parse_token_weight(text)
        assert str(read) == printed
        assert parse_token_weight(printed) == read

    @pytest.mark.parametrize(
        "text",
        [
            "up_down=uniform",
            "uniform,clip",
            "uniform,=clip",
            "uniform,o_in=clip,o_in=clip",
            "uniform,o_in=norm",
            "clip,",
        ],
    )
    def test_what_means_nothing_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="cannot read the token weight"):
            parse_token_weight(text)


def test_the_weight_of_a_token_is_its_saliency() -> None:
    x, saliency = torch.ones(3, 2), torch.tensor([4.0, 0.0, 9.0])
    scales = parse_token_weight("gradient").scales(x, saliency=saliency)
    assert scales is not None
    assert scales.tolist() == [2.0, 0.0, 3.0]
    with pytest.raises(UsageError, match="needs the saliency"):
        parse_token_weight("gradient").scales(x)

"""Every operator keeps its contract with weights, biases, its inverse, its dense form, its state and statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from qtool.errors import ArtifactError, NumericalError, PluginError, ShapeError, UsageError
from qtool.numerics.hadamard import hadamard_matrix, random_signs
from qtool.numerics.operators import (
    OPERATORS,
    Affine,
    Block,
    Diag,
    Hadamard,
    HeadMix,
    Kron,
    Operator,
    Orthogonal,
    Perm,
    Shift,
    Signs,
    carry_hessian,
    carry_hessian_blocks,
    carry_mean,
    compose_act,
    operator_from_state,
)
from qtool.numerics.second_moments import diagonal_blocks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(*shape, shape[-1], seed=seed)).Q


def invertible(*shape: int, seed: int = 0) -> Tensor:
    """Well-conditioned, not symmetric."""
    return normal(*shape, shape[-1], seed=seed) * 0.15 + torch.eye(shape[-1], dtype=torch.float64)


def signs(n: int) -> Tensor:
    return random_signs(n, torch.Generator().manual_seed(n))


def scales(*shape: int) -> Tensor:
    return normal(*shape, seed=4).exp() * signs(math.prod(shape)).double().reshape(shape)


def permutation(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))


def block_diagonal(matrices: Tensor, repeat: int = 1) -> Tensor:
    return torch.block_diag(*matrices.repeat_interleave(repeat, 0))


KINDS: dict[str, Callable[[], tuple[Operator, Tensor]]] = {
    "shift": lambda: (Shift(normal(24)), torch.eye(24).double()),
    "shift-heads": lambda: (Shift(normal(3, 8), heads=3), torch.eye(24).double()),
    "diag": lambda: (Diag(scales(24)), torch.diag(scales(24))),
    "diag-heads": lambda: (Diag(scales(3, 8), heads=3), torch.diag(scales(3, 8).flatten())),
    "signs": lambda: (Signs(signs(24).to(torch.int8)), torch.diag(signs(24).double())),
    "signs-heads": lambda: (Signs(signs(24).reshape(3, 8), heads=3), torch.diag(signs(24).double())),
    "perm": lambda: (Perm(permutation(24)), torch.eye(24).double()[:, permutation(24)]),
    "perm-int32": lambda: (Perm(permutation(24).int()), torch.eye(24).double()[:, permutation(24)]),
    "hadamard-power": lambda: (Hadamard(32), hadamard_matrix(32).double() / math.sqrt(32)),
    "hadamard": lambda: (Hadamard(24), hadamard_matrix(24).double() / math.sqrt(24)),
    "hadamard-signs": lambda: (
        Hadamard(12, signs(12).to(torch.int8)),
        torch.diag(signs(12).double()) @ hadamard_matrix(12).double() / math.sqrt(12),
    ),
    "hadamard-blocks": lambda: (
        Hadamard(36, signs(36), block_size=12),
        torch.diag(signs(36).double()) @ block_diagonal(hadamard_matrix(12).double()[None], 3) / math.sqrt(12),
    ),
    "hadamard-transposed": lambda: (
        Hadamard(24, signs(24), block_size=12, transposed=True),
        block_diagonal(hadamard_matrix(12).double().T[None], 2) @ torch.diag(signs(24).double()) / math.sqrt(12),
    ),
    "head_mix": lambda: (
        HeadMix(12, 3),
        torch.kron(hadamard_matrix(12).double() / math.sqrt(12), torch.eye(3).double()),
    ),
    "head_mix-transposed": lambda: (
        HeadMix(12, 2, transposed=True),
        torch.kron(hadamard_matrix(12).double().T.contiguous() / math.sqrt(12), torch.eye(2).double()),
    ),
    "orthogonal": lambda: (Orthogonal(rotation(24)), rotation(24)),
    "orthogonal-heads": lambda: (Orthogonal(rotation(3, 8), heads=3), block_diagonal(rotation(3, 8))),
    "affine": lambda: (Affine.from_matrix(invertible(24)), invertible(24)),
    "affine-heads": lambda: (Affine.from_matrix(invertible(3, 8), heads=3), block_diagonal(invertible(3, 8))),
    "kron": lambda: (Kron(invertible(4), invertible(6, seed=2)), torch.kron(invertible(4), invertible(6, seed=2))),
    "block": lambda: (Block(invertible(3, 8), 24), block_diagonal(invertible(3, 8))),
    "block-shared": lambda: (Block(invertible(1, 8), 24), block_diagonal(invertible(1, 8), 3)),
}


@pytest.fixture(params=list(KINDS))
def case(request: pytest.FixtureRequest) -> tuple[Operator, Tensor]:
    """Return an operator and its dense ``T`` by definition."""
    return KINDS[request.param]()


def offset(operator: Operator, n: int) -> Tensor:
    """``z`` over the whole axis."""
    return (
        operator.z.flatten().repeat(n // operator.z.numel()) if isinstance(operator, Shift) else torch.zeros(n).double()
    )


def close(received: Tensor, expected: Tensor, *, atol: float = 1e-12) -> None:
    torch.testing.assert_close(received, expected, rtol=0, atol=atol)


def test_every_kind_is_registered_and_tried() -> None:
    assert {operator.kind for operator, _ in (make() for make in KINDS.values())} == set(OPERATORS)


def test_act_is_the_dense_product(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    n = operator.heads * operator.dim
    assert dense.shape == (n, n)
    close(operator.to_dense(), dense)
    x = normal(2, 5, n, seed=7)
    close(operator.act(x), (x - offset(operator, n)) @ dense)
    close(operator.act(x[0, 0]), operator.act(x)[0, 0])


def test_act_and_its_inverse_undo_each_other(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    x = normal(5, dense.shape[0], seed=7)
    close(operator.act_inverse(operator.act(x)), x)
    close(operator.act(operator.act_inverse(x)), x)
    inverse = operator.inverse()
    assert inverse.kind == operator.kind
    close(inverse.act(x), operator.act_inverse(x))
    close(inverse.act_inverse(x), operator.act(x))
    close(inverse.weight_in(x), operator.inverse().inverse().inverse().weight_in(x))


def test_a_consumer_computes_what_it_did(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    n = dense.shape[0]
    x, weight, bias = normal(5, n, seed=7), normal(9, n, seed=8), normal(9, seed=9)
    expected = x @ weight.T + bias
    new_bias = operator.bias_in(weight, bias)
    assert new_bias is not None
    close(operator.act(x) @ operator.weight_in(weight).T + new_bias, expected)
    close(operator.weight_in(weight), weight @ torch.linalg.inv(dense).T)
    alone = operator.bias_in(weight, None)
    if isinstance(operator, Shift):
        assert alone is not None
        close(operator.act(x) @ operator.weight_in(weight).T + alone, x @ weight.T)
    else:
        assert alone is None


def test_a_producer_absorbs_the_operator(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    n = dense.shape[0]
    u, weight, bias = normal(5, 7, seed=7), normal(n, 7, seed=8), normal(n, seed=9)
    produced = u @ weight.T + bias
    close(u @ operator.weight_out(weight).T + operator.bias_out(bias), operator.act(produced))
    close(operator.weight_out(weight), dense.T @ weight)
    assert operator.weight_out(weight).is_contiguous()


def test_state_comes_back_bit_for_bit(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    tensors, params = operator.state()
    again = operator_from_state(operator.kind, tensors, json.loads(json.dumps(params)))
    assert type(again) is type(operator)
    again_tensors, again_params = again.state()
    assert again_params == params
    assert again_tensors.keys() == tensors.keys()
    assert all(torch.equal(again_tensors[name], tensors[name]) for name in tensors)
    assert all(again_tensors[name].dtype == tensors[name].dtype for name in tensors)
    x = normal(3, dense.shape[0])
    assert torch.equal(again.act(x), operator.act(x))
    assert torch.equal(OPERATORS[operator.kind].from_state(tensors, params).act(x), operator.act(x))


def test_condition_number_and_group(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    singular_values = torch.linalg.svdvals(dense)
    assert operator.log_condition() == pytest.approx(float((singular_values[0] / singular_values[-1]).log()), abs=1e-9)
    identity = torch.eye(dense.shape[0]).double()
    orthogonal = torch.allclose(dense @ dense.T, identity, atol=1e-12)
    diagonal = torch.equal(dense, torch.diag(dense.diagonal()))
    reordered = bool(((dense == 0) | (dense == 1)).all()) and not torch.equal(dense, identity)
    if not isinstance(operator, Shift):
        assert (operator.is_orthogonal, operator.is_diagonal, operator.is_permutation) == (
            orthogonal,
            diagonal,
            reordered,
        )


def test_arguments_are_kept(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    x = normal(6, dense.shape[0])
    before, state = x.clone(), {name: tensor.clone() for name, tensor in operator.state()[0].items()}
    for method in (operator.act, operator.act_inverse, operator.weight_in):
        method(x).zero_()
    operator.weight_out(x.T).zero_()
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in operator.state()[0].items())


def test_half_precision_is_computed_in_float32(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    x = normal(5, dense.shape[0], seed=7).to(torch.bfloat16)
    for method in (operator.act, operator.act_inverse, operator.weight_in):
        received, exact = method(x), method(x.double())
        assert received.dtype == torch.bfloat16
        close(method(x.float()).double(), exact, atol=1e-5)
        assert torch.equal(received, method(x.float()).to(torch.bfloat16))


def test_a_wrong_axis_is_refused(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    with pytest.raises(ShapeError, match=f"`{operator.kind}` operator does not fit"):
        operator.act(normal(2, dense.shape[0] + 1))


def test_an_empty_batch_stays_empty(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    assert operator.act(torch.zeros(0, dense.shape[0])).shape == (0, dense.shape[0])
    assert operator.weight_in(torch.zeros(0, dense.shape[0])).shape == (0, dense.shape[0])


def test_neighbours_share_the_operator_of_their_head(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    heads, dim, repeat = operator.heads, operator.dim, 2
    x = normal(5, heads * repeat * dim, seed=7)
    z = offset(operator, heads * dim).reshape(heads, dim)
    by_head = x.reshape(5, heads, repeat, dim)
    parts = dense.reshape(heads, dim, heads, dim)
    expected = torch.stack([(by_head[:, h] - z[h]) @ parts[h, :, h] for h in range(heads)], 1)
    close(operator.act(x), expected.reshape(5, -1))
    weight, bias = normal(9, x.shape[1], seed=8), normal(9, seed=9)
    new_bias = operator.bias_in(weight, bias)
    assert new_bias is not None
    close(operator.act(x) @ operator.weight_in(weight).T + new_bias, x @ weight.T + bias)


def test_an_axis_of_heads_is_the_same_as_heads_side_by_side() -> None:
    for name in ("shift-heads", "diag-heads", "signs-heads", "orthogonal-heads", "affine-heads"):
        operator, _ = KINDS[name]()
        x, bias = normal(5, 3, 8, seed=7), normal(5, seed=8)
        close(operator.act(x).flatten(1), operator.act(x.flatten(1)))
        close(operator.act_inverse(x).flatten(1), operator.act_inverse(x.flatten(1)))
        close(operator.weight_in(x).flatten(1), operator.weight_in(x.flatten(1)))
        close(operator.weight_out(x.movedim(0, -1)).flatten(0, 1), operator.weight_out(x.flatten(1).T))
        close(operator.bias_out(x[0]).flatten(), operator.bias_out(x[0].flatten()))
        first, second = operator.bias_in(x, bias), operator.bias_in(x.flatten(1), bias)
        assert first is not None
        assert second is not None
        close(first, second)


@pytest.mark.parametrize("leading", [(), (1,)])
def test_one_head_may_have_an_axis_of_its_own(leading: tuple[int, ...]) -> None:
    x = normal(4, 8)
    for operator, dense in (
        (Shift(normal(*leading, 8)), torch.eye(8).double()),
        (Diag(scales(8).reshape(*leading, 8)), torch.diag(scales(8))),
        (Orthogonal(rotation(8).reshape(*leading, 8, 8)), rotation(8)),
        (Affine.from_matrix(invertible(8).reshape(*leading, 8, 8)), invertible(8)),
    ):
        assert operator.heads == 1
        close(operator.act(x), (x - offset(operator, 8)) @ dense)


def test_operators_in_a_row() -> None:
    operators = [
        Shift(normal(24)),
        Diag(scales(24)),
        Hadamard(24, signs(24)),
        Kron(invertible(4), invertible(6)),
        Perm(permutation(24)),
    ]
    x, weight, bias = normal(5, 24, seed=7), normal(9, 24, seed=8), normal(9, seed=9)
    folded, new_bias = weight, bias
    for operator in operators:
        corrected = operator.bias_in(folded, new_bias)
        assert corrected is not None
        folded, new_bias = operator.weight_in(folded), corrected
    close(compose_act(operators, x) @ folded.T + new_bias, x @ weight.T + bias, atol=1e-11)
    for first, second in pairwise(operators[1:]):
        assert not torch.allclose(compose_act([first, second], x), compose_act([second, first], x))


def test_hessian_and_mean_are_those_of_the_transformed_samples(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    n = dense.shape[0]
    samples = normal(50, n, seed=7) @ normal(n, n, seed=8) + normal(n, seed=9)
    hessian, mean = samples.T @ samples / 50, samples.mean(0)
    acted = operator.act(samples)
    close(carry_hessian([operator], hessian, mean=mean), acted.T @ acted / 50, atol=1e-10)
    close(carry_mean([operator], mean), acted.mean(0))


def test_channels_are_mixed_inside_of_a_span(case: tuple[Operator, Tensor]) -> None:
    operator, dense = case
    size = operator.span
    assert len(dense) % size == 0
    mixed = block_diagonal(torch.ones(len(dense) // size, size, size, dtype=torch.float64))
    assert not bool(dense[mixed == 0].any())
    half = block_diagonal(torch.ones(2 * len(dense) // size, size // 2, size // 2)) if size % 2 == 0 else dense
    assert size == 1 or bool(dense[half == 0].any()), "a smaller one would do"


SPANS = {"hadamard-blocks": 12, "hadamard-transposed": 12, "block": 8, "block-shared": 8, "affine-heads": 8}


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_a_hessian_are_carried_where_they_are_not_mixed(name: str) -> None:
    operator, dense = KINDS[name]()
    n = len(dense)
    samples = normal(50, n, seed=7) @ normal(n, n, seed=8) + normal(n, seed=9)
    acted, mean = operator.act(samples), samples.mean(0)
    for size in (n // 2, n // 3) if n % 3 == 0 else (n // 2,):
        found = carry_hessian_blocks(operator, diagonal_blocks(samples.T @ samples / 50, size), mean=mean)
        follows = operator.is_diagonal or operator.group == "shift" or size % SPANS.get(name, operator.dim) == 0
        assert (found is not None) == follows, size
        if found is not None:
            close(found, diagonal_blocks(acted.T @ acted / 50, size), atol=1e-10)
    if operator.group == "shift":
        with pytest.raises(UsageError, match="only with the mean"):
            carry_hessian_blocks(operator, torch.zeros(3, n // 3, n // 3, dtype=torch.float64))


def test_hessian_is_carried_through_several_operators() -> None:
    operators = [
        Diag(scales(3, 8), heads=3),
        Shift(normal(24)),
        Affine.from_matrix(invertible(24)),
        Shift(normal(24, seed=5)),
        HeadMix(12, 2),
    ]
    samples = normal(50, 24, seed=7) + 1.0
    acted = compose_act(operators, samples)
    carried = carry_hessian(operators, samples.T @ samples / 50, mean=samples.mean(0))
    close(carried, acted.T @ acted / 50, atol=1e-10)
    with pytest.raises(UsageError, match="only with the mean"):
        carry_hessian(operators, samples.T @ samples / 50)


@pytest.mark.parametrize(
    ("operator", "flops"),
    [
        (Shift(normal(8)), 8),
        (Diag(normal(3, 8), heads=3), 24),
        (Signs(signs(8)), 8),
        (Perm(permutation(8)), 0),
        (Hadamard(14336), 14336 * (9 + 28)),
        (Hadamard(4096, signs(4096), block_size=128), 4096 * (7 + 1)),
        (HeadMix(32, 128), 4096 * 5),
        (Orthogonal(rotation(3, 8), heads=3), 3 * 2 * 64),
        (Affine.from_matrix(invertible(8)), 2 * 64),
        (Kron(invertible(4), invertible(6)), 2 * 24 * 10),
        (Block(invertible(1, 8), 24), 2 * 24 * 8),
    ],
)
def test_flops_of_one_token(operator: Operator, flops: int) -> None:
    assert operator.flops() == flops


def test_gradients_reach_learned_parameters() -> None:
    for parameter, make in (
        (scales(8), Diag),
        (rotation(8), Orthogonal),
        (invertible(8), Affine.from_matrix),
        (invertible(2, 4), lambda matrices: Block(matrices, 8)),
    ):
        parameter.requires_grad_()
        operator = make(parameter)
        (operator.act(normal(3, 8)).square().sum() + operator.weight_in(normal(3, 8, seed=1)).pow(4).sum()).backward()
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_parameters_that_make_no_operator_are_refused() -> None:
    with pytest.raises(NumericalError, match="zero or not finite"):
        Diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(NumericalError, match="zero or not finite"):
        Diag(torch.tensor([1.0, math.inf]))
    for make in (Signs, lambda s: Hadamard(2, s)):
        with pytest.raises(NumericalError, match=r"not all \+1 or -1"):
            make(torch.tensor([1.0, 0.5]))
    with pytest.raises(ShapeError, match="not a permutation of 3 channels"):
        Perm(torch.tensor([0, 2, 2]))
    with pytest.raises(ShapeError, match="does not divide"):
        Hadamard(24, block_size=16)
    with pytest.raises(ShapeError, match="signs do not fit"):
        Hadamard(8, torch.ones(4))
    with pytest.raises(ShapeError, match="`268`"):
        Hadamard(268)
    with pytest.raises(ShapeError, match="does not fit its 2 heads"):
        Diag(torch.ones(3, 8), heads=2)
    with pytest.raises(ShapeError, match="does not fit its 1 heads"):
        Orthogonal(rotation(3, 8))
    with pytest.raises(ShapeError, match="blocks do not fit an axis of 24"):
        Block(invertible(2, 8), 24)
    with pytest.raises((ShapeError, TypeCheckError)):
        Affine(invertible(8), invertible(4))
    with pytest.raises(NumericalError, match="singular"):
        Affine.from_matrix(torch.ones(4, 4))
    with pytest.raises(NumericalError, match="singular"):
        Kron(torch.ones(2, 2), torch.eye(2)).weight_in(torch.ones(3, 4))


def test_states_of_something_else_are_refused() -> None:
    with pytest.raises(PluginError, match="unknown operator kind `givens`") as caught:
        operator_from_state("givens", {}, {})
    assert "head_mix" in caught.value.hint
    with pytest.raises(ArtifactError, match="not what this kind holds"):
        operator_from_state("diag", {"z": torch.ones(4)}, {})
    with pytest.raises(ArtifactError, match="not what this kind holds"):
        operator_from_state("block", {"matrices": invertible(1, 4)}, {})
    with pytest.raises(ShapeError, match="another Hadamard matrix of order `24`"):
        operator_from_state("hadamard", {}, {"n": 24, "core_order": 24})

"""Zig-zag orders: channels dealt to blocks so that no block gets all the large ones."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from qtool.errors import ShapeError


def zigzag_order(magnitudes: Float[Tensor, " n"], blocks: int) -> Int64[Tensor, " n"]:
    """Deal channels to blocks as cards are dealt to and fro, the largest first.

    The largest channel goes to block 0, the next to block 1, …, to block B - 1, and the next B the other way round,
    from block B - 1 to block 0. So the sums of any two blocks differ by no more than the largest channel.

    Args:
        magnitudes: Size of each channel. Equal ones keep their order.
        blocks: ``B``, which divides the number of channels; a block is a run of neighbours.

    Returns:
        At each place, the channel that is put there; within a block the largest comes first.

    Raises:
        ShapeError: ``blocks`` does not divide the number of channels.

    References:
        Lin et al. 2024, DuQuant, arXiv:2406.01721, section 3.2.

    Example:
        >>> zigzag_order(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), 2)
        tensor([0, 3, 4, 1, 2, 5])
    """
    if blocks < 1 or len(magnitudes) % blocks:
        raise ShapeError("blocks do not divide the channels", facts=(("channels", len(magnitudes)), ("blocks", blocks)))
    dealt = magnitudes.argsort(descending=True, stable=True).reshape(-1, blocks).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)

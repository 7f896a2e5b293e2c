"""The diagonal of the empirical Fisher, which EWC, Fisher merging and SLAO weigh weights by."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def summed_squares(gradients: Iterable[Sequence[Tensor]]) -> tuple[list[Tensor], int]:
    """Σ g² over rows.

    Args:
        gradients: of one row's log-likelihood after the other, the labels being the true ones.

    Returns:
        the sums in float32, in the adapter's order, empty without a row; and how many rows there were.
    """
    total: list[Tensor] = []
    rows = 0
    for row in gradients:
        rows += 1
        squares = [gradient.float().square() for gradient in row]
        total = [old + new for old, new in zip(total, squares, strict=True)] if total else squares
    return total, rows

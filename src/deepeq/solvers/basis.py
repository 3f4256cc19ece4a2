"""Vectors that solvers keep, stored so that products with all of them are one pass over memory."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from deepeq.norms import LONGEST, inner

_BLOCK = 16
"""Vectors in a block: few, so that little memory is held in advance, but enough for batched products to pay."""
_LARGE = 2**20
"""Numbers in a block on the CPU. The system returns larger ones when they are freed, and clearing new ones takes longer
than writing them."""
FAST = 400
"""Multiplications in each product from which on the CPU has a fast routine for a batch of them."""


class Basis(NamedTuple):
    """Vectors `(B, N)`, in blocks `(B, n, N)` whose last one may have room for more."""

    blocks: tuple[Tensor, ...] = ()
    size: int = 0

    def append(self, q: Tensor, capacity: int, *, minus: Tensor | None = None) -> Self:
        """Return the vectors with one more, `q` or `q - minus`; blocks are made for `capacity` vectors at most.

        Writes into the last block where it has room and no gradient is recorded, so `self` must not be used again.
        """
        if torch.is_grad_enabled():
            q = q if minus is None else q - minus
            return self._replace(blocks=(*self.blocks, q.unsqueeze(1)), size=self.size + 1)
        blocks, place = self.blocks, self.size - sum(block.shape[1] for block in self.blocks[:-1])
        if not blocks or place == blocks[-1].shape[1]:
            most = _BLOCK if q.is_cuda else min(_BLOCK, max(4, _LARGE // max(1, q.numel())))
            room = max(1, min(most, capacity - self.size))
            blocks, place = (*blocks, q.new_empty((q.shape[0], room, q.shape[1]))), 0
        blocks[-1][:, place] = q
        if minus is not None:
            blocks[-1][:, place].sub_(minus)
        return self._replace(blocks=blocks, size=self.size + 1)

    @property
    def last(self) -> Tensor:
        """The vector that was appended last, `(B, N)`."""
        return self.parts()[-1][:, -1]

    def parts(self) -> list[Tensor]:
        """Return the blocks without their free places."""
        *full, last = self.blocks
        return [*full, last[:, : self.size - sum(block.shape[1] for block in full)]]

    def inner(self, w: Tensor) -> Tensor:
        """Return the inner products of each vector with `w`, `(B, size)`."""
        rows = []
        for part in self.parts():
            if _is_small(part):
                rows += [inner(q, w).unsqueeze(1) for q in part.unbind(1)]
            elif part.shape[2] <= LONGEST:
                rows.append(times(w, part.mT))
            else:
                pairs = zip(w.split(LONGEST, dim=1), part.split(LONGEST, dim=2), strict=True)
                rows.append(torch.stack([times(some, more.mT) for some, more in pairs]).sum(dim=0))
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def add(self, w: Tensor, coefficients: Tensor, *, sign: int = 1) -> Tensor:
        """Return `w` plus, or minus, a combination of the vectors.

        Args:
            w: Vectors `(B, N)`.
            coefficients: Coefficients of the combination, `(B, size)`.
            sign: 1 for plus, -1 for minus.
        """
        parts = self.parts()
        for part, row in zip(parts, coefficients.split([part.shape[1] for part in parts], dim=1), strict=True):
            if _is_small(part):
                for q, coefficient in zip(part.unbind(1), row.split(1, dim=1), strict=True):
                    w = torch.addcmul(w, q, coefficient, value=sign)
            else:
                product = times(row, part)
                w = product.add_(w) if sign == 1 else torch.sub(w, product)
        return w


def times(row: Tensor, matrix: Tensor) -> Tensor:
    """Return the products `(B, m), (B, m, n) -> (B, n)`."""
    # As a row times a matrix it is several times faster, on the CPU, than as a matrix times a column.
    return torch.bmm(row.unsqueeze(1), matrix).squeeze(1)


def _is_small(matrix: Tensor) -> bool:
    return matrix.shape[1] * matrix.shape[2] < FAST

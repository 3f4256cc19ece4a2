"""What type checkers see of solutions: `make lint` checks the assertions; nothing here is run by the tests."""

from typing import assert_type

import torch
from torch import Tensor

import deepeq
from deepeq.nn import DenseCell

x = torch.randn(2, 3)
layer = deepeq.DEQ(DenseCell(3, 4))
assert_type(layer(x), deepeq.Solution[Tensor])
assert_type(layer(x).value, Tensor)
assert_type(layer(x, (x, x)).value, tuple[Tensor, Tensor])
assert_type(deepeq.Unrolled(DenseCell(3, 4), 3)(x), deepeq.Solution[Tensor])
assert_type(deepeq.fixed_point(torch.cos, x), deepeq.Solution[Tensor])


def swap(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a state of two tensors."""
    return z[1], z[0]


assert_type(deepeq.fixed_point(swap, (x, x)).value, tuple[Tensor, Tensor])

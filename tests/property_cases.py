"""Random solves, each drawn from one seed, and what they should give, computed in float64 without the library."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deepeq import GMRES, Anderson, Broyden, FixedPointIteration, Solver
from deepeq.solvers.conjugate_gradient import ConjugateGradient
from deepeq.solvers.newton_krylov import NewtonKrylov

AFFINE = ("contraction", "non-normal", "rotation", "expanding", "symmetric", "singular", "translation", "constant")
OTHER = ("tanh", "relu", "softmax", "product", "sin", "abs", "sign", "exp", "log", "root", "hypot")


@dataclass
class Layout:
    """Where each real number of a state belongs, found by counting."""

    structure: Any
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    batch_dims: int
    segments: Tensor | None
    owner: Tensor = field(init=False)
    """Problem of each number, `(D,)`."""
    part: Tensor = field(init=False)
    position: Tensor = field(init=False)
    """Number of the group that the norm "positions" takes together; counted within a problem."""
    num_problems: int = field(init=False)

    def __post_init__(self) -> None:
        owners, parts, positions, first = [], [], [], 0
        self.num_problems = 1
        for number, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            repeat = 2 if dtype.is_complex else 1
            grid = torch.arange(math.prod(shape)).reshape(shape)
            if self.segments is not None:
                self.num_problems = int(self.segments.max()) + 1 if len(self.segments) else 1
                owner = self.segments.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
                leading = 1
            elif self.batch_dims == 0 or not shape:
                owner, leading = torch.zeros_like(grid), 0
            else:
                leading = self.batch_dims
                self.num_problems = math.prod(shape[:leading])
                owner = torch.arange(self.num_problems).reshape(*shape[:leading], *(1 for _ in shape[leading:]))
                owner = owner.expand(shape)
            # Rows of one segment are positions of one problem, so there the first dimension counts too.
            inner = shape[leading - 1 :] if self.segments is not None else shape[leading:]
            channels = inner[-1] if len(shape) > leading else 1
            position = grid // max(1, channels) + first
            first += grid.numel() + 1
            owners.append(owner.reshape(-1).repeat_interleave(repeat))
            parts.append(torch.full_like(owners[-1], number))
            positions.append(position.reshape(-1).repeat_interleave(repeat))
        self.owner, self.part, self.position = torch.cat(owners), torch.cat(parts), torch.cat(positions)

    @property
    def compute_dtype(self) -> torch.dtype:
        wide = any(dtype in (torch.float64, torch.complex128) for dtype in self.dtypes)
        return torch.float64 if wide else torch.float32

    @property
    def eps(self) -> float:
        """Rounding of the coarsest part."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)

    def flat(self, state: Any, dtype: torch.dtype) -> Tensor:
        """Return all numbers of a state as `(D,)`."""
        leaves = pytree.tree_leaves(state)
        # Not view_as_real, whose derivative refuses odd offsets.
        rows = [torch.stack((leaf.real, leaf.imag), -1) if leaf.is_complex() else leaf for leaf in leaves]
        return torch.cat([row.reshape(-1).to(dtype) for row in rows])

    def state(self, flat: Tensor) -> Any:
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = math.prod(shape) * (2 if dtype.is_complex else 1)
            leaf = flat[start : start + size]
            start += size
            if dtype.is_complex:
                leaves.append(torch.complex(*leaf.reshape(*shape, 2).unbind(-1)).to(dtype))
            else:
                leaves.append(leaf.reshape(shape).to(dtype))
        return pytree.tree_unflatten(leaves, self.structure)

    def batch_shape(self) -> tuple[int, ...]:
        if self.segments is None and self.batch_dims >= 2:
            return self.shapes[0][: self.batch_dims]
        return (self.num_problems,)


@dataclass
class RandomMap:
    """`F(x) = S phi(x / S) + p`, with `phi` of order one, problem by problem: `x` is gathered into rows `(P, n)`."""

    family: str
    matrix: Tensor
    """`(P, n, n)`."""
    scale: Tensor
    """S, `(D,)`."""
    shift: Tensor
    """p, `(D,)`, in the units of the state."""
    index: Tensor
    """Number of the state at each place of the rows, `(P, n)`; D at places that are empty."""
    place: Tensor
    """Place of each number in the flattened rows, `(D,)`."""
    curved: float = 1.0

    def to(self, dtype: torch.dtype) -> "RandomMap":
        values = (self.matrix.to(dtype), self.scale.to(dtype), self.shift.to(dtype))
        return RandomMap(self.family, *values, self.index, self.place, self.curved)

    def rows(self, flat: Tensor) -> Tensor:
        return torch.cat([flat, flat.new_zeros(1)])[self.index]

    def phi(self, y: Tensor) -> Tensor:
        """Return `phi` of rows `(P, n)`."""
        a = (self.matrix * y.unsqueeze(1)).sum(dim=2)  # the same arithmetic for every number of rows
        if self.family in AFFINE:
            return a
        return {
            "tanh": lambda: torch.tanh(a),
            "relu": lambda: torch.relu(a + 0.3),
            "softmax": lambda: 2.0 * torch.softmax(a, dim=1),
            "product": lambda: 0.5 * self.curved * a * y,
            "sin": lambda: self.curved * torch.sin(a),
            "abs": lambda: -a.abs(),
            "sign": lambda: torch.sign(-y - 0.1),
            "exp": lambda: torch.exp(-a) if self.curved < 0.5 else torch.exp(a),
            "log": lambda: torch.log(1.5 + a),
            "root": lambda: torch.sqrt(0.5 + a),
            "hypot": lambda: torch.sqrt(1.0 + y * y),
        }[self.family]()

    def __call__(self, flat: Tensor, shift: Tensor | None = None) -> Tensor:
        value = self.phi(self.rows(flat / self.scale)).reshape(-1)[self.place]
        return self.scale * value + (self.shift if shift is None else shift)

    def magnitude(self, flat: Tensor) -> Tensor:
        """Return the size of what is added up in `F(x)`, `(D,)`: rounding errors are a few eps times this."""
        y = self.rows(flat / self.scale)
        a = (self.matrix.abs() * y.abs().unsqueeze(1)).sum(dim=2)
        value = self.phi(y)
        gain = 1.0 + a  # derivatives of phi are of this order, or of that of the value
        if self.family in ("exp", "product"):
            gain = gain * (1.0 + value.abs() + y.abs())
        if self.family in ("log", "root"):
            inside = (self.matrix * y.unsqueeze(1)).sum(dim=2) + (1.5 if self.family == "log" else 0.5)
            gain = gain * (1.0 + 1.0 / inside.abs().clamp_min(1e-12))
        if self.family == "sign":
            gain = gain + 1e6 * ((y + 0.1).abs() < 1e-3)
        size = (gain + value.abs() + y.abs()).reshape(-1)[self.place]
        return self.scale * size + self.shift.abs() + flat.abs()


@dataclass
class Case:
    """One solve."""

    seed: int
    layout: Layout
    map: RandomMap
    z0: Any
    solver: Solver
    root: bool
    unit: float
    """Factor of `g(x) = unit (F(x) - x)`, for roots."""
    norm: str
    mode: str
    """"grad", "no_grad" or "inference"."""
    adjoint: str
    coupled: bool
    """Whether problems, as the solve is told, depend on each other."""
    verify: bool
    keep: tuple[int, ...]
    on_failure: str
    nonfinite: str
    start: str
    loss: Tensor
    """Gradient of the loss with respect to the value, `(D,)`."""

    def __str__(self) -> str:
        layout = self.layout
        kinds = ", ".join(f"{str(d)[6:]}{tuple(s)}" for d, s in zip(layout.dtypes, layout.shapes, strict=True))
        what = f"root_find unit={self.unit:.1e}" if self.root else "fixed_point"
        scales = f"{float(self.map.scale.min()):.0e}..{float(self.map.scale.max()):.0e}" if len(layout.owner) else "-"
        problems = (
            f"batch_dims={layout.batch_dims}" if layout.segments is None else f"segments={layout.segments.tolist()}"
        )
        return (
            f"seed {self.seed}: {what} {self.map.family} [{kinds}] {problems} scale {scales} start={self.start} "
            f"{self.solver} norm={self.norm} {self.mode} {self.adjoint} coupled={self.coupled} verify={self.verify} "
            f"keep={self.keep} on_failure={self.on_failure} nonfinite={self.nonfinite}"
        )

    def f(self, parameters: RandomMap, shift: Tensor | None = None) -> Callable[[Any], Any]:
        """Return the function of states that is handed to the solve."""
        layout, dtype = self.layout, self.layout.compute_dtype

        def function(state: Any) -> Any:
            flat = layout.flat(state, dtype)
            value = parameters(flat, shift)
            return layout.state(self.unit * (value - flat) if self.root else value)

        return function

    def norm_argument(self) -> Any:
        if self.norm not in ("largest", "two numbers"):
            return self.norm
        layout = self.layout

        def norm(state: Any) -> Tensor:
            size = layout.flat(state, layout.compute_dtype).abs()
            largest = size.new_zeros(layout.num_problems).scatter_reduce(0, layout.owner, size, "amax")
            if self.norm == "largest":
                return largest
            total = size.new_zeros(layout.num_problems).index_add(0, layout.owner, size)
            return torch.stack([largest, total], dim=1)

        return norm

    def norms(self, flat: Tensor) -> Tensor:
        """Return the numbers that are compared with the tolerances, `(P, groups)`, of float64 numbers `(D,)`."""
        layout = self.layout
        size = flat.abs()
        if self.norm in ("largest", "two numbers"):
            largest = size.new_zeros(layout.num_problems).scatter_reduce(0, layout.owner, size, "amax")
            total = size.new_zeros(layout.num_problems).index_add(0, layout.owner, size)
            return torch.stack([largest, total] if self.norm == "two numbers" else [largest], dim=1)
        group = {"whole": torch.zeros_like(layout.part), "parts": layout.part, "positions": layout.position}[self.norm]
        count = int(group.max()) + 1 if len(group) else 1
        place = layout.owner * count + group
        most = size.new_full((layout.num_problems * count,), 1e-300)
        most = most.scatter_reduce(0, place, size.nan_to_num(0.0, 0.0, 0.0), "amax")
        squares = torch.zeros_like(most).index_add(0, place, (size / most[place]).square())
        return (squares.sqrt() * most).reshape(layout.num_problems, count)

    def measured(self, parameters: RandomMap, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `||g||`, `||f(z)||` and the size of rounding errors in `||g||`, `(P, groups)`, all in float64."""
        value = parameters(flat)
        unit = abs(self.unit) if self.root else 1.0
        size = unit * (parameters.magnitude(flat) + flat.abs()).nan_to_num(math.inf)
        n = parameters.matrix.shape[-1]
        noise = 4 * (n + 6) * self.layout.eps * self.norms(size)
        tiny = 4 * (n + 6) * torch.finfo(self.layout.compute_dtype).tiny * max(1.0, unit)
        return self.norms(unit * (value - flat)), self.norms(value), noise + tiny


def draw(seed: int) -> Case:
    """Return the case of a seed."""
    r = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    coupled = r.random() < 0.12
    layout = _layout(r, coupled)
    family = r.choice(AFFINE if r.random() < 0.5 else OTHER)
    count = len(layout.owner)
    narrow = layout.compute_dtype == torch.float32
    exponent = 0.0 if r.random() < 0.5 else r.uniform(-29, 29)
    part_scale = [10.0**exponent] * len(layout.shapes)
    if len(layout.shapes) > 1 and r.random() < 0.4:
        spread = r.choice([1, 3, 9, 12])
        part_scale = [10.0 ** max(-29.0, min(29.0, exponent + r.uniform(-spread, spread))) for _ in layout.shapes]
    scale = torch.tensor(part_scale, dtype=torch.float64)[layout.part]

    owner = torch.zeros_like(layout.owner) if coupled else layout.owner
    num_problems = 1 if coupled else layout.num_problems
    members = [torch.nonzero(owner == p).reshape(-1) for p in range(num_problems)]
    n = max([1, *map(len, members)])
    index = torch.full((num_problems, n), count, dtype=torch.int64)
    place = torch.zeros(count, dtype=torch.int64)
    matrix = torch.zeros(num_problems, n, n, dtype=torch.float64)
    for p, numbers in enumerate(members):
        index[p, : len(numbers)] = numbers
        place[numbers] = p * n + torch.arange(len(numbers))
        matrix[p, : len(numbers), : len(numbers)] = _matrix(family, len(numbers), r, generator)
    shift = scale * torch.randn(count, generator=generator, dtype=torch.float64)
    if r.random() < 0.08 or (family == "singular" and r.random() < 0.3):
        shift = torch.zeros_like(shift)
    dtype = layout.compute_dtype
    parameters = RandomMap(family, matrix, scale, shift, index, place, r.choice([0.3, 1.0, 2.0])).to(dtype)

    root = r.random() < 0.3
    unit = 1.0
    if root:
        largest = 29 if narrow else 40
        unit = r.choice([-1.0, 1.0]) * (1.0 if r.random() < 0.4 else 10.0 ** r.uniform(-20, 20))
        while not 10.0**-largest < abs(unit) * min([1.0, *part_scale]) <= abs(unit) * max(part_scale) < 10.0**largest:
            unit = r.choice([-1.0, 1.0]) * 10.0 ** r.uniform(-20, 20)
    start = r.choice(
        ["zero", "zero", "random", "random", "solution", "huge", "nan"] if r.random() < 0.5 else ["zero", "random"]
    )
    flat = _start(start, parameters.to(torch.float64), r, generator).to(dtype)
    mode = r.choice(["grad", "grad", "no_grad", "no_grad", "inference"])
    adjoint = r.choice(["implicit"] * 4 + ["checkpoint", "twice", "neumann", "phantom", "backprop"])
    solver = _solver(r, family, layout, max(part_scale) * abs(unit))
    if isinstance(solver, NewtonKrylov) and adjoint == "backprop":
        adjoint = "implicit"  # its singular value decompositions have no finite derivative
    steps = solver.max_steps
    keep = tuple(r.randint(1, steps + 3) for _ in range(r.randint(1, 3))) if r.random() < 0.2 else ()
    loss = torch.randn(count, generator=generator, dtype=torch.float64) / scale
    if r.random() < 0.3:
        loss = loss * (torch.rand(count, generator=generator) < 0.3)
    return Case(
        seed=seed,
        layout=layout,
        map=parameters,
        z0=layout.state(flat),
        solver=solver,
        root=root,
        unit=unit,
        norm=r.choice(["parts", "parts", "whole", "positions", "largest", "two numbers"]),
        mode=mode,
        adjoint=adjoint,
        coupled=coupled and layout.num_problems > 1,
        verify=r.random() < 0.85,
        keep=keep,
        on_failure=r.choice(["warn", "warn", "ignore", "raise"]),
        nonfinite=r.choice(["raise", "keep"]),
        start=start,
        loss=loss,
    )


def _layout(r: random.Random, coupled: bool) -> Layout:
    real, pair = r.choice([(torch.float32, torch.complex64), (torch.float64, torch.complex128)])
    num_parts = r.choice([1, 1, 1, 2, 3])
    dtypes = [pair if r.random() < 0.15 else real for _ in range(num_parts)]
    if r.random() < 0.06:
        dtypes = [torch.bfloat16] * num_parts
    elif num_parts > 1 and r.random() < 0.1:
        dtypes[0] = torch.float32
    batch_dims, segments = r.choice([1, 1, 1, 1, 0, 2]), None
    inners = [r.choice([(), (1,), (3,), (5,), (8,), (2, 3)]) for _ in range(num_parts)]
    batch = r.choice([1, 2, 3, 4])
    if r.random() < 0.02:
        batch = 0
    if coupled:
        batch, batch_dims = r.choice([2, 3, 4]), r.choice([1, 1, 2])
        inners = [r.choice([(), (1,), (2,), (3,)]) for _ in range(num_parts)]
    leading: tuple[int, ...] = {0: (), 1: (batch,), 2: (2, max(1, batch - 1))}[batch_dims]
    if batch_dims == 0:
        inners = [r.choice([(), (1,), (4,), (2, 5), (2, 2, 2)]) for _ in range(num_parts)]
    shapes = [(*leading, *inner) for inner in inners]
    if batch_dims == 1 and not coupled and r.random() < 0.15:
        rows = r.randint(1, 7)
        segments = torch.tensor([r.randint(0, 2) for _ in range(rows)])
        shapes = [(rows, *inner) for inner in [r.choice([(), (1,), (3,)]) for _ in range(num_parts)]]
    elif batch_dims == 1 and not coupled and r.random() < 0.06:
        shapes = [()] * num_parts
    example: Any = [0] * num_parts
    structure = r.choice(["tuple", "list", "dict", "nested"])
    if num_parts == 1 and r.random() < 0.8:
        example = 0
    elif structure == "tuple":
        example = tuple(example)
    elif structure == "dict":
        example = {name: 0 for name in "abc"[:num_parts]}
    elif structure == "nested":
        example = {"a": 0, "rest": tuple(example[1:])} if num_parts > 1 else {"a": [0]}
    return Layout(pytree.tree_flatten(example)[1], shapes, dtypes, batch_dims, segments)


def _matrix(family: str, n: int, r: random.Random, generator: torch.Generator) -> Tensor:
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if not n or family == "constant":
        return torch.zeros(n, n, dtype=torch.float64)
    if family == "translation":
        return torch.eye(n, dtype=torch.float64)
    q = torch.linalg.qr(normal)[0]
    spectrum = torch.rand(n, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    if family == "expanding":
        spectrum = spectrum * r.choice([2.0, 3.0, -4.0])
    if family == "singular":
        spectrum[0] = 1.0
    if family == "rotation":
        return q * r.choice([0.5, 0.9, 1.1])
    symmetric = q @ torch.diag(spectrum) @ q.T
    if family in ("contraction", "symmetric", "expanding", "singular"):
        return symmetric
    if family == "non-normal":
        upper = torch.triu(torch.randn(n, n, generator=generator, dtype=torch.float64), 1)
        return q @ (torch.diag(spectrum) + r.choice([0.5, 2.0]) * upper) @ q.T
    return r.choice([0.5, 1.0, 2.0]) * normal / n**0.5


def _start(start: str, parameters: RandomMap, r: random.Random, generator: torch.Generator) -> Tensor:
    scale = parameters.scale
    noise = scale * torch.randn(len(scale), generator=generator, dtype=torch.float64)
    if start == "zero" or not len(scale):
        return torch.zeros_like(scale)
    if start == "huge":
        return noise * 1e4
    if start == "nan":
        noise[r.randrange(len(scale))] = r.choice([math.nan, math.inf])
    if start == "solution":
        z = torch.zeros_like(scale)
        jacobian = dense_jacobian(parameters, z)
        step = torch.linalg.lstsq(
            torch.eye(jacobian.shape[-1]).double() - jacobian, rows_in_units(parameters, z)
        ).solution
        return (step.reshape(-1)[parameters.place] * scale).nan_to_num(0.0)
    return noise


def rows_in_units(parameters: RandomMap, flat: Tensor) -> Tensor:
    """Return `(F(x) - x) / S` as rows `(P, n, 1)`."""
    return parameters.rows((parameters(flat) - flat) / parameters.scale).unsqueeze(2)


def dense_jacobian(parameters: RandomMap, flat: Tensor) -> Tensor:
    """Return the derivative of `phi` at `flat / S`, `(P, n, n)`, row by row."""
    y = parameters.rows(flat / parameters.scale).detach().requires_grad_()
    with torch.enable_grad():
        value = parameters.phi(y)
        rows = [
            torch.autograd.grad(value[:, i].sum(), y, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
            for i in range(value.shape[1])
            if value.requires_grad
        ]
    jacobian = torch.stack(rows, dim=1) if rows else y.new_zeros(*y.shape, y.shape[1])
    used = (parameters.index < len(flat)).to(jacobian.dtype)
    return jacobian.detach() * used.unsqueeze(1) * used.unsqueeze(2)


def _solver(r: random.Random, family: str, layout: Layout, scale: float) -> Solver:
    tolerances = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    if layout.eps > 1e-4:
        tolerances = [1e-1, 3e-2, 1e-2]
    elif layout.eps < 1e-10:
        tolerances += [1e-8, 1e-10]
    options: dict[str, Any] = {"rtol": r.choice(tolerances), "max_steps": r.choice([0, 1, 2, 5, 12, 30, 30, 30, 60])}
    if r.random() < 0.25:
        options["atol"] = scale * 10.0 ** -r.randint(1, 5)
        if r.random() < 0.3:
            options["rtol"] = 0.0
    if r.random() < 0.15:
        options["min_steps"] = min(r.randint(1, 5), options["max_steps"])
    kinds = ["plain", "anderson", "broyden", "broyden", "newton"]
    if family in AFFINE or r.random() < 0.1:
        kinds += ["gmres", "gmres", "cg"]
    kind = r.choice(kinds)
    if kind == "plain":
        return FixedPointIteration(damping=r.choice([0.0, 0.3]), **options)
    if kind == "anderson":
        ridge = r.choice([1e-8, 1e-12])
        return Anderson(history_size=r.choice([1, 3, 8]), damping=r.choice([0.0, 0.2]), ridge=ridge, **options)
    if kind == "broyden":
        history, search = r.choice([1, 4, 30]), r.choice([0, 0, 3])
        return Broyden(history_size=history, damping=r.choice([0.0, 0.2]), line_search_steps=search, **options)
    if kind == "newton":
        options["max_steps"] = min(options["max_steps"], 12)
        options["min_steps"] = min(options.get("min_steps", 0), options["max_steps"])
        return NewtonKrylov(inner_steps=r.choice([2, 40]), backtracks=r.choice([0, 30]), **options)
    return GMRES(restart=r.choice([3, 50]), **options) if kind == "gmres" else ConjugateGradient(**options)


def leaves_equal(a: Any, b: Any) -> bool:
    """Return whether two states agree in every bit, NaN included."""
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)

"""Configuration: how each phase solves, and what the schedules change."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from deepeq import (
    GMRES,
    Adjoint,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConjugateGradient,
    Equilibrium,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Pieces,
    Solver,
    Stack,
)
from deepeq.train import (
    Cosine,
    Drops,
    EquilibriumConfig,
    FolderConfig,
    Geometric,
    Linear,
    OptimizerConfig,
    Plateau,
    RunConfig,
)


def test_mistakes_of_one_part_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"optimizer.lr=0.0 must be > 0 and finite; optimizer.max_gradient_norm=0"):
        OptimizerConfig(lr=0.0, max_gradient_norm=0.0)
    with pytest.raises(ValueError, match=r"equilibrium.pretrain_fraction=1.0 .*; equilibrium.pretrain_depth=0"):
        EquilibriumConfig(pretrain_fraction=1.0, pretrain_depth=0)
    with pytest.raises(ValueError, match=r"equilibrium.piece_len=4 solves several maps"):
        EquilibriumConfig(piece_len=4, jacobian_weight=0.1)
    with pytest.raises(ValueError, match=r"equilibrium.jacobian_schedule=Cosine\(.*\) needs a jacobian_weight"):
        EquilibriumConfig(jacobian_schedule=Cosine())
    with pytest.raises(ValueError, match=r"equilibrium.tolerance_schedule=Linear\(.*\) must stay > 0"):
        EquilibriumConfig(tolerance_schedule=Linear(end=0.0))
    with pytest.raises(ValueError, match=r"run.dir='' must name a folder"):
        FolderConfig(dir="")


def test_phases_solve_as_the_configuration_says() -> None:
    config = EquilibriumConfig(
        solver=Anderson(max_steps=5), backward_solver=GMRES(max_steps=4), eval_solver=Broyden(max_steps=9)
    )
    seen = []
    stack, training = (config.training_how(step, 10, on_backward=seen.append) for step in (1, 2))
    assert stack == Stack(depth=3)
    assert isinstance(training, Equilibrium)
    assert training.solver == Anderson(max_steps=5)
    adjoint = ImplicitAdjoint(solver=GMRES(max_steps=4), on_failure="ignore", callback=seen.append)
    assert training.adjoint == adjoint
    assert config.evaluation_how() == Equilibrium(solver=Broyden(max_steps=9), on_failure="ignore", verify=False)
    pieces = replace(config, piece_len=7)
    assert pieces.training_how(2, 10, on_backward=seen.append) == Pieces(equilibrium=training, length=7)
    assert isinstance(pieces.evaluation_how(), Pieces)


def solver_at(config: EquilibriumConfig, step: int, num_steps: int, validations: Sequence[float] = ()) -> Solver:
    how = config.training_how(step, num_steps, validations)
    assert isinstance(how, Equilibrium)
    return how.solver


def depth_at(config: EquilibriumConfig, step: int, num_steps: int) -> int:
    how = config.training_how(step, num_steps)
    assert isinstance(how, Stack)
    return how.depth


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Cosine(end=0.1), lr_warmup_steps=4)
    rates = [config.lr_at(step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_cosine_equals_its_formula_to_the_last_bit(end: float) -> None:
    """The learning rates of the results in `benchmarks/` came from this formula."""
    config = OptimizerConfig(lr=3e-3, schedule=Cosine(end=end), lr_warmup_steps=50)
    for step in range(50, 2200):
        fraction = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - 50) / (2200 - 1 - 50))))
        assert config.lr_at(step, 2200) == 3e-3 * (end + (1.0 - end) * fraction)


def test_default_schedule_is_a_cosine_down_to_a_twentieth() -> None:
    for step in (0, 99, 100, 500, 999):
        default, given = (OptimizerConfig(schedule=schedule) for schedule in (None, Cosine(end=0.05)))
        assert default.lr_at(step, 1000) == given.lr_at(step, 1000)


def test_learning_rate_drops_at_fractions_of_the_steps_after_the_rise() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Drops(at=(0.5, 0.8)), lr_warmup_steps=1)
    rates = [config.lr_at(step, 12) for step in range(12)]
    assert rates == pytest.approx([2.0] * 6 + [0.2] * 3 + [0.02] * 3)
    at_once = OptimizerConfig(lr=2.0, schedule=Drops(at=(0.5,)), lr_warmup_steps=0)
    assert [at_once.lr_at(step, 10) for step in range(10)] == pytest.approx([2.0] * 5 + [0.2] * 5)


def test_learning_rate_follows_the_validations_after_the_rise() -> None:
    config = OptimizerConfig(lr=2.0, schedule=Plateau(patience=0), lr_warmup_steps=4)
    assert config.lr_at(3, 100, [1.0, 1.5]) == 2.0
    assert config.lr_at(4, 100, [1.0, 1.5]) == 1.0
    assert config.lr_at(4, 100) == 2.0


def test_runs_shorter_than_the_rise_and_of_one_step_have_a_rate() -> None:
    assert OptimizerConfig(lr=2.0, lr_warmup_steps=50).lr_at(9, 10) == 2.0 * 10 / 50
    assert OptimizerConfig(lr=2.0, lr_warmup_steps=0).lr_at(0, 1) == 2.0


def test_jacobian_weight_moves_after_the_shallow_stack_and_is_paid_evenly() -> None:
    schedule = Linear(start=1.0, end=3.0)
    config = EquilibriumConfig(
        pretrain_fraction=0.0, jacobian_weight=0.5, jacobian_schedule=schedule, jacobian_fraction=0.5
    )
    weights = [config.jacobian_weight_at(step, 11) for step in range(11)]
    assert weights == pytest.approx([0, 0.6, 0, 0.8, 0, 1.0, 0, 1.2, 0, 1.4, 0])
    config = EquilibriumConfig(
        pretrain_fraction=0.5, jacobian_weight=0.5, jacobian_schedule=schedule, jacobian_fraction=1.0
    )
    weights = [config.jacobian_weight_at(step, 10) for step in range(10)]
    assert weights == pytest.approx([0.5] * 6 + [0.75, 1.0, 1.25, 1.5])
    always = EquilibriumConfig(jacobian_weight=0.3, jacobian_fraction=1.0)
    assert [always.jacobian_weight_at(step, 5) for step in range(5)] == [0.3] * 5


def test_jacobian_weight_follows_the_validations() -> None:
    config = EquilibriumConfig(jacobian_weight=0.5, jacobian_schedule=Plateau(patience=0), jacobian_fraction=1.0)
    assert [config.jacobian_weight_at(5, 10, losses) for losses in ([], [1.0], [1.0, 1.0])] == [0.5, 0.5, 0.25]


def test_tolerance_goes_from_loose_to_tight_after_the_shallow_stack() -> None:
    solver = Broyden(rtol=1e-3, atol=1e-5, max_steps=12, history_size=7)
    schedule = Geometric(start=100.0, end=1.0)
    config = EquilibriumConfig(solver=solver, pretrain_fraction=0.2, tolerance_schedule=schedule)
    solvers = [solver_at(config, step, 15) for step in range(3, 15)]
    factors = [100.0 ** (1 - i / 11) for i in range(12)]
    assert [s.rtol for s in solvers] == pytest.approx([1e-3 * factor for factor in factors])
    assert [s.atol for s in solvers] == pytest.approx([1e-5 * factor for factor in factors])
    assert solvers[-1] == solver
    assert all(isinstance(s, Broyden) and s.history_size == 7 and s.max_steps == 12 for s in solvers)


def test_step_limit_is_rounded_up_and_stays_at_least_one() -> None:
    solver = Anderson(rtol=1e-2, max_steps=12)
    config = EquilibriumConfig(solver=solver, pretrain_fraction=0.0, step_limit_schedule=Linear(start=0.0, end=1.0))
    limits = [solver_at(config, step, 11).max_steps for step in range(11)]
    assert limits == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert solver_at(config, 5, 11).rtol == 1e-2


def test_step_limit_ignores_the_rounding_of_a_factor() -> None:
    assert 1000 * 0.1**2 > 10  # by a rounding error
    config = EquilibriumConfig(
        solver=Anderson(max_steps=1000), pretrain_fraction=0.0, step_limit_schedule=Drops(at=(0.1, 0.2))
    )
    assert solver_at(config, 9, 10).max_steps == 10


def test_stack_of_pretraining_grows_to_its_last_step() -> None:
    config = EquilibriumConfig(pretrain_fraction=0.5, pretrain_depth=2, pretrain_depth_schedule=Linear(end=3.0))
    assert [depth_at(config, step, 10) for step in range(5)] == [2, 3, 4, 5, 6]
    steps = replace(config, pretrain_depth_schedule=Drops(at=(0.5,), multiplier=1.5))
    assert [depth_at(steps, step, 10) for step in range(5)] == [2, 2, 3, 3, 3]
    assert depth_at(replace(config, pretrain_depth_schedule=None), 4, 10) == 2


def test_growing_stack_needs_steps_to_grow_in() -> None:
    with pytest.raises(ValueError, match="needs a pretrain_fraction above 0"):
        EquilibriumConfig(pretrain_fraction=0.0, pretrain_depth_schedule=Linear(end=3.0))


def test_solver_without_a_schedule_is_the_one_of_the_configuration() -> None:
    solver = Anderson(rtol=1e-2, max_steps=12)
    assert solver_at(EquilibriumConfig(solver=solver), 3, 10) is solver
    assert solver_at(EquilibriumConfig(), 3, 10) == EquilibriumConfig().with_defaults().solver


def test_solver_follows_the_validations() -> None:
    config = EquilibriumConfig(
        solver=Anderson(rtol=1e-2, max_steps=12),
        pretrain_fraction=0.0,
        tolerance_schedule=Plateau(patience=0, floor=0.3),
    )
    rtols = [solver_at(config, 5, 10, losses).rtol for losses in ([], [1.0], [1.0, 1.0], [1.0] * 9)]
    assert rtols == pytest.approx([1e-2, 1e-2, 5e-3, 3e-3])


def test_equilibrium_section_of_an_explicit_network_is_refused(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"equilibrium is set, but model.depth=2 makes an explicit network"):
        replace(config, model=replace(config.model, depth=2))


@pytest.mark.parametrize("kind", [GMRES, ConjugateGradient])
@pytest.mark.parametrize("name", ["solver", "eval_solver"])
def test_linear_solvers_are_for_the_backward_pass_alone(kind: type[Solver], name: str) -> None:
    sentence = f"{name}={kind.__name__} solves linear equations; only equilibrium.backward_solver takes it"
    with pytest.raises(ValueError, match=sentence):
        EquilibriumConfig(**{name: kind()})
    assert EquilibriumConfig(backward_solver=kind()).backward_solver == kind()


def test_step_limit_that_would_fall_below_min_steps_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"solver.max_steps=30 down to 3, below solver.min_steps=5; lower min_steps"):
        EquilibriumConfig(solver=Broyden(min_steps=5), step_limit_schedule=Linear(end=0.1))
    EquilibriumConfig(solver=Broyden(min_steps=3), step_limit_schedule=Linear(end=0.1))


@pytest.mark.parametrize("adjoint", [PhantomAdjoint(steps=2), NeumannAdjoint(terms=3), BackpropAdjoint()])
def test_an_adjoint_of_a_recipe_is_the_one_that_trains(adjoint: Adjoint) -> None:
    how = EquilibriumConfig(adjoint=adjoint).training_how(9, 10)
    assert isinstance(how, Equilibrium)
    assert how.adjoint == adjoint


def test_an_adjoint_without_a_backward_solve_takes_no_backward_solver() -> None:
    with pytest.raises(ValueError, match="adjoint=NeumannAdjoint has no backward solve"):
        EquilibriumConfig(adjoint=NeumannAdjoint(), backward_solver=GMRES())
    with pytest.raises(ValueError, match="adjoint=ImplicitAdjoint is what backward_solver sets up"):
        EquilibriumConfig(adjoint=ImplicitAdjoint())

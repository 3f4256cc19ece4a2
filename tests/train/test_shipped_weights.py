"""The trained model of the paper's table 1 that the repository carries."""

from pathlib import Path

import pytest
import torch

from deepeq import DEQ, Anderson, Broyden, FixedPointIteration, Solver
from deepeq.data import CopyMemory, CopyMemoryConfig
from deepeq.models import TiedNetwork
from deepeq.train.hub import open_model

FOLDER = Path(__file__).parents[2] / "pretrained" / "copy_memory"
PAPER_LOSS, MOST_PARAMETERS = 3.5e-6, 14_500


def test_shipped_equilibrium_copies_across_400_blanks_better_than_in_the_paper() -> None:
    config, vocabulary, model = open_model(FOLDER)
    assert vocabulary is None
    assert config.data.copy_memory == CopyMemoryConfig()  # T = 400, 2,000 sequences to test on
    assert model.num_params <= MOST_PARAMETERS
    tokens, targets = (ids[:40] for ids in CopyMemory(config.data.copy_memory).sequences("test"))
    with torch.no_grad():
        output = model(tokens, None, targets)
    assert output.nll is not None
    assert output.nll.mean() <= PAPER_LOSS
    assert output.solution.converged.all()


@pytest.mark.parametrize(
    "solver",
    [
        Broyden(rtol=1e-5, max_steps=200, history_size=200),
        Anderson(rtol=1e-4, max_steps=200),
        FixedPointIteration(rtol=1e-4, max_steps=200),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_shipped_equilibrium_is_one_whichever_solver_looks_for_it(solver: Solver) -> None:
    config, _, model = open_model(FOLDER)
    tokens, targets = (ids[:4] for ids in CopyMemory(config.data.copy_memory).sequences("test"))
    assert isinstance(model.network, TiedNetwork)
    assert isinstance(model.network.core, DEQ)
    model.network.core.solver = solver
    with torch.no_grad():
        output = model(tokens, None, targets)
    assert output.solution.converged.all()
    assert output.nll.mean() <= PAPER_LOSS

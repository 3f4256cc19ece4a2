"""The trained models that the repository carries: that of the paper's table 1, and the quickstart's."""

import json
import math
from pathlib import Path

import pytest
import torch

from deepeq import Anderson, Broyden, Equilibrium, FixedPointIteration, Solver
from deepeq.data import CopyMemory, CopyMemoryConfig
from deepeq.train import PretrainedModel, open_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pretrained" / "copy_memory"
RESULT = ROOT / "benchmarks" / "results" / "2026-11-21_2-core-cpu_copy_memory" / "copy_memory.json"
PAPER_LOSS, MOST_PARAMETERS = 3.5e-6, 14_500
MOST_LOSS = 1e-5  # three times the measured one, for other arithmetic and few sequences; without memory it is 0.0495
MOST_LOSS_OF_A_TOKEN = 0.01  # so each digit has a probability of 0.99; the measured one is a fiftieth


def test_measured_loss_is_below_that_of_the_paper() -> None:
    """Of the whole test set, as committed."""
    measured = json.loads(RESULT.read_text())["models"]["copy_memory"]
    assert measured["test_loss"] <= PAPER_LOSS
    assert f"value: {measured['test_loss']!r}\n" in (FOLDER / "README.md").read_text()
    assert (measured["num_params"], measured["test_unconverged"]) == (13_946, 0.0)


def test_shipped_equilibrium_copies_across_400_blanks() -> None:
    trained = open_model(FOLDER)
    assert trained.tokenizer is None
    assert trained.config.data.copy_memory == CopyMemoryConfig()  # T = 400, 2,000 sequences to test on
    assert trained.model.num_params <= MOST_PARAMETERS
    tokens, targets = (ids[:40] for ids in CopyMemory().sequences("test"))
    with torch.no_grad():
        output = trained.model(tokens, None, targets, how=trained.how)
    assert output.nll is not None
    assert output.nll.max() <= MOST_LOSS_OF_A_TOKEN
    assert output.nll.mean() <= MOST_LOSS
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
def test_shipped_equilibrium_is_nearly_one_whichever_solver_looks_for_it(solver: Solver) -> None:
    trained = open_model(FOLDER)
    tokens, targets = (ids[:4] for ids in CopyMemory().sequences("test"))
    with torch.no_grad():
        shipped, output = (
            trained.model(tokens, None, targets, how=how) for how in (trained.how, Equilibrium(solver=solver))
        )
    assert output.solution.converged.all()
    assert output.nll.max() <= MOST_LOSS_OF_A_TOKEN
    assert output.nll.mean() <= MOST_LOSS
    # Where the map moves a state slowly, a small residual leaves it some room: one to two per cent.
    states = [solved.solution.value.flatten(1) for solved in (shipped, output)]
    assert ((states[1] - states[0]).norm(dim=1) <= 0.1 * states[0].norm(dim=1)).all()


def test_shipped_quickstart_predicts_and_writes_text() -> None:
    model = PretrainedModel.from_pretrained(ROOT / "pretrained" / "quickstart")
    assert model.trained.unit == "character"
    tokens = model.trained.tokenizer.encode("The class statement defines a class object. " * 6).unsqueeze(0)
    with torch.no_grad():
        output = model(tokens[:, :-1], None, tokens[:, 1:])
    assert output.solution.converged.all()
    assert float(output.nll.mean()) / math.log(2) < 3.0  # bits per character; a uniform guess has 6.7
    text = model.generate("The ", num_tokens=40)
    assert len(text) == 40
    assert text == model.generate("The ", num_tokens=40)


def test_card_of_the_quickstart_has_the_committed_result() -> None:
    (result,) = sorted((ROOT / "benchmarks" / "results").glob("*_quickstart/result.json"))
    bits = json.loads(result.read_text())["test_bits_per_character"]
    assert f"value: {bits!r}\n" in (ROOT / "pretrained" / "quickstart" / "README.md").read_text()

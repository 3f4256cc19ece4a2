"""What `import deepeq` gives, and what it needs."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import deepeq

PUBLIC_NAMES = [
    "DEQ",
    "GMRES",
    "Adjoint",
    "Anderson",
    "BackpropAdjoint",
    "Broyden",
    "Cell",
    "ConjugateGradient",
    "ConvergenceError",
    "ConvergenceWarning",
    "Equilibrium",
    "FixedPointIteration",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "NewtonKrylov",
    "PhantomAdjoint",
    "Pieces",
    "Result",
    "Solution",
    "Solver",
    "Stack",
    "Subsequences",
    "Unrolled",
    "error_bound",
    "fixed_point",
    "jacobian_penalty",
    "root_find",
    "smallest_singular_value",
    "spectral_radius",
]
SOURCE = Path(deepeq.__file__).parent

IMPORT_WITH_TORCH_ALONE = """
import sys

BLOCKED = {
    "datasets", "huggingface_hub", "jsonargparse", "lightning", "matplotlib", "pandas", "pooch", "rich", "safetensors",
    "scipy", "tensorboard", "tokenizers", "torchdeq", "yaml",
}


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this test")


sys.meta_path.insert(0, Block())
import deepeq
import torch

solution = deepeq.fixed_point(torch.cos, torch.zeros(1, 1))
assert solution.converged.all()
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
for part in ("nn", "models", "data", "train", "cli"):
    assert f"deepeq.{part}" not in sys.modules, part
print("fine")
"""


def test_core_needs_torch_alone():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_TORCH_ALONE],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "fine\n", done.stderr


def test_public_names_are_these():
    """A name joins, leaves or is renamed here too, so that no one does it by accident."""
    assert sorted(deepeq.__all__) == sorted(PUBLIC_NAMES)
    assert len(set(deepeq.__all__)) == len(deepeq.__all__)


def test_public_names_exist_and_are_documented():
    for name in deepeq.__all__:
        item = getattr(deepeq, name)
        assert (inspect.getdoc(item) or "").strip(), name
        assert item.__module__.startswith("deepeq."), name


def test_no_module_hides_behind_a_public_name():
    modules = {path.stem for path in SOURCE.iterdir()}
    assert not modules & set(deepeq.__all__)


def test_every_option_of_a_public_dataclass_is_documented():
    for name in deepeq.__all__:
        item = getattr(deepeq, name)
        if not hasattr(item, "__dataclass_fields__"):
            continue
        tree = ast.parse(inspect.getsource(item)).body[0]
        for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            known = ("rtol", "atol", "max_steps", "_jacobian")
            if isinstance(statement, ast.AnnAssign) and statement.target.id not in known:
                documented = isinstance(getattr(following, "value", None), ast.Constant)
                assert documented, f"{name}.{statement.target.id}"


def test_parts_are_imported_at_their_first_use():
    code = """
import sys
import deepeq
assert "torch" not in sys.modules
deepeq.nn.weight_norm, deepeq.models.TransformerConfig, deepeq.packing.Norm, deepeq.universality.stack
assert set(deepeq.__all__) <= set(dir(deepeq))
assert not hasattr(deepeq, "nothing")
from deepeq import *
assert DEQ is deepeq.layers.DEQ
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"deepeq.{home}" for home, names in deepeq._HOMES.items() for name in names}
    assert sorted(typed) == sorted(deepeq.__all__)


def test_version_matches_the_distribution():
    pyproject = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())
    assert deepeq.__version__ == pyproject["project"]["version"]


def test_package_is_marked_as_typed():
    assert (SOURCE / "py.typed").exists()

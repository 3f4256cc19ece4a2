"""What a run is made of: one frozen dataclass a part, one YAML file a run."""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from deepeq.data import DataConfig
from deepeq.data.files import write_atomically
from deepeq.models import LayerConfig, ModelConfig
from deepeq.solvers import GMRES, Anderson, Broyden, Solver
from deepeq.train.schedules import Cosine, Schedule

# A recipe may name the classes of this library and nothing else: a foreign one must not run code.
set_parsing_settings(
    import_path_denylist=["*"], import_path_allowlist=["deepeq"], docstring_parse_attribute_docstrings=True
)


def _raise(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))


@dataclass(frozen=True, kw_only=True)
class EquilibriumConfig:
    """How equilibria are found and differentiated while training, and how the training warms up."""

    # None stands for the default: with a solver there, the parsing library would lend its options to another class.
    solver: Solver | None = None
    """Forward solver while training; default `Anderson(rtol=1e-2, max_steps=12)`."""
    backward: Solver | None = None
    """Solver of the backward fixed point; default `GMRES(rtol=1e-1, max_steps=8)`."""
    evaluation: Solver | None = None
    """Forward solver of evaluation and generation; default `Broyden(rtol=1e-3, max_steps=40, history_size=20)`."""
    warm_up_share: float = 0.2
    """Share of the steps that train a shallow stack of the cell first (Bai et al. 2019, appendix E); in [0, 1)."""
    warm_up_depth: int = 3
    """Depth of that stack, in layers."""
    warm_up_depth_schedule: Schedule | None = None
    """What multiplies `warm_up_depth` from the first step to the last one of the stack, rounded up: a stack that grows
    comes close to its equilibrium; None for nothing."""
    subsequence_len: int | None = None
    """Solve for pieces of a segment of at most this length, one after the other (appendix E); None for one piece."""
    jacobian_weight: float = 0.0
    """Weight of `jacobian_penalty` in the loss, which keeps the equilibrium easy to find; 0 for none."""
    jacobian_share: float = 0.5
    """Share of the steps that pay for the penalty, evenly spread; in (0, 1]."""
    jacobian_schedule: Schedule | None = None
    """What multiplies `jacobian_weight`, from the first step after the shallow stack to the last; None for nothing."""
    tolerance_schedule: Schedule | None = None
    """What multiplies `rtol` and `atol` of `solver` over the same steps: `Geometric(start=10, end=1)` of `deepeq.train`
    goes from loose to tight."""
    step_limit_schedule: Schedule | None = None
    """What multiplies `max_steps` of `solver` over the same steps, rounded up."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("solver", "evaluation"):
            if isinstance(getattr(self, name), GMRES):
                problems.append(f"{name}=GMRES solves linear equations, which are those of the backward pass alone")
        if not 0.0 <= self.warm_up_share < 1.0:
            problems.append(f"warm_up_share={self.warm_up_share!r} must lie in [0, 1)")
        if self.warm_up_depth < 1:
            problems.append(f"warm_up_depth={self.warm_up_depth!r} must be >= 1")
        if self.warm_up_depth_schedule is not None and not self.warm_up_share:
            problems.append(
                f"warm_up_depth_schedule={self.warm_up_depth_schedule!r} needs a warm_up_share above 0, steps to act in"
            )
        if self.subsequence_len is not None and self.subsequence_len < 1:
            problems.append(f"subsequence_len={self.subsequence_len!r} must be >= 1")
        if self.subsequence_len is not None and self.jacobian_weight:
            problems.append(
                f"subsequence_len={self.subsequence_len!r} solves several maps, and the Jacobian penalty is of one: "
                "leave jacobian_weight out"
            )
        if not 0.0 <= self.jacobian_weight < math.inf:
            problems.append(f"jacobian_weight={self.jacobian_weight!r} must be >= 0 and finite")
        if self.jacobian_schedule is not None and not self.jacobian_weight:
            problems.append(f"jacobian_schedule={self.jacobian_schedule!r} needs a jacobian_weight to multiply")
        if self.tolerance_schedule is not None and not min(map(self.tolerance_schedule.factor, (0.0, 1.0))) > 0.0:
            problems.append(f"tolerance_schedule={self.tolerance_schedule!r} must stay > 0")
        if not 0.0 < self.jacobian_share <= 1.0:
            problems.append(f"jacobian_share={self.jacobian_share!r} must lie in (0, 1]")
        _raise("equilibrium", problems)

    def with_defaults(self) -> "EquilibriumConfig":
        """The same with the default solvers in the place of None."""
        return replace(
            self,
            solver=self.solver or Anderson(rtol=1e-2, max_steps=12),
            backward=self.backward or GMRES(rtol=1e-1, max_steps=8),
            evaluation=self.evaluation or Broyden(rtol=1e-3, max_steps=40, history_size=20),
        )

    def warm_up_steps(self, num_steps: int) -> int:
        """How many of the steps of a run train the shallow stack."""
        return math.ceil(self.warm_up_share * num_steps)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow the gradient: the rule, and the learning rate over the steps."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`adamw` is Adam with decoupled decay, plain Adam at `weight_decay=0`; `sgd` is without momentum."""
    lr: float = 2e-3
    """Learning rate after the rise, which the schedule multiplies."""
    schedule: Schedule | None = None
    """What multiplies `lr` from the end of the rise to the last step; default `Cosine(end=0.05)` of `deepeq.train`."""
    warm_up_steps: int = 50
    """Optimizer steps of the linear rise to `lr`."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay of the running mean of the gradient and of its square."""
    weight_decay: float = 0.01
    """Decay of matrices; vectors have none."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this Euclidean norm."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.lr < math.inf:
            problems.append(f"lr={self.lr!r} must be > 0 and finite")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            problems.append(f"betas={self.betas!r} must lie in [0, 1)")
        if self.warm_up_steps < 0 or not 0.0 <= self.weight_decay < math.inf:
            problems.append(f"warm_up_steps={self.warm_up_steps!r} and weight_decay={self.weight_decay!r} must be >= 0")
        if not self.max_gradient_norm > 0.0:
            problems.append(f"max_gradient_norm={self.max_gradient_norm!r} must be > 0")
        _raise("optimizer", problems)

    def with_defaults(self) -> "OptimizerConfig":
        """The same with the default schedule in the place of None."""
        return replace(self, schedule=self.schedule or Cosine(end=0.05))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and rhythm of a run."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Contiguous streams of the corpus that are trained side by side, over all processes."""
    segment_len: int = 64
    """Tokens of a stream in one step."""
    eval_batch_size: int = 16
    """Streams of the validation and test text."""
    eval_segment_len: int | None = None
    """Tokens of a stream in one evaluation; None for `segment_len`."""
    eval_every: int = 500
    """Optimizer steps between two looks at the validation text."""
    checkpoint_every: int = 500
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints are kept, besides the best one."""
    log_every: int = 20
    """Optimizer steps between two lines of metrics."""
    seed: int = 0
    """Seed of the first weights and of sampling."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Arithmetic of the networks in training; with `bf16-mixed`, solver algebra and evaluation stay in float32."""
    accumulate: int = 1
    """Parts in which a process goes through its share of a batch before a step: less memory, the same gradient."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How processes started by `torchrun` share the work: each with a copy of the model (`ddp`, and `auto` for
    several), or with a part of its parameters, gradients and optimizer state (`fsdp`)."""
    wandb_project: str | None = None
    """Weights & Biases project that also gets the metrics; None for none."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "segment_len",
            "eval_batch_size",
            "eval_every",
            "checkpoint_every",
            "log_every",
            "keep_checkpoints",
            "accumulate",
        )
        problems = [f"{name}={getattr(self, name)!r} must be >= 1" for name in counts if getattr(self, name) < 1]
        if self.batch_size % max(1, self.accumulate):
            problems.append(f"batch_size={self.batch_size!r} must be a multiple of accumulate={self.accumulate!r}")
        if self.eval_segment_len is not None and self.eval_segment_len < 1:
            problems.append(f"eval_segment_len={self.eval_segment_len!r} must be >= 1")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed={self.seed!r} must lie in [0, 2^63)")
        _raise("train", problems)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Where a run lives."""

    name: str = "run"
    """First part of the default folder's name."""
    dir: str | None = None
    """The run folder; default `runs/NAME-DATE-TIME`."""

    def __post_init__(self) -> None:
        if self.dir == "":
            raise ValueError("run.dir='' must name a folder")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run; a recipe is this in YAML."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    equilibrium: EquilibriumConfig = field(default_factory=EquilibriumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: FolderConfig = field(default_factory=FolderConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", self.optimizer.with_defaults())
        if self.model.depth == 0:
            object.__setattr__(self, "equilibrium", self.equilibrium.with_defaults())
        elif self.equilibrium != EquilibriumConfig():
            raise ValueError(
                f"equilibrium is set, but model.depth={self.model.depth!r} makes an explicit network, which has none: "
                "leave equilibrium out, or set model.depth to 0"
            )


def condensed(message: str) -> str:
    """The sentence about the mistake in a message of the parsing library about a value of one of several classes."""
    before, union, rest = message.partition("Does not validate against any of the Union subtypes")
    if not union:
        return message
    errors = rest.partition("Errors:")[2].partition("Given value type:")[0]
    sentences = [" ".join(part.split()) for part in re.split(r"\n *- ", errors)]
    told = "; ".join(part for part in sentences if part and "NoneType" not in part)
    return f"{before.rstrip()} {told}".lstrip()


def add_run_arguments(parser: ArgumentParser) -> None:
    """Give a parser `--config FILE` and an option for every field."""
    parser.add_argument("--config", action="config", help="a recipe, or the config.yaml of an earlier run")
    parser.add_class_arguments(RunConfig)
    # Its default is another class than a recipe may name, and would lend that one its options.
    parser.set_defaults({"model.layer": None})


def run_config(values: Namespace) -> RunConfig:
    """The typed configuration from what a parser of `add_run_arguments` read and instantiated."""
    return RunConfig(**{part.name: values[part.name] for part in fields(RunConfig)})


@cache
def _recipe_parser() -> ArgumentParser:
    """One for all recipes: to build it takes longer than to parse one."""
    parser = ArgumentParser(exit_on_error=False)
    add_run_arguments(parser)
    return parser


def load_config(path: Path, *, complete: bool = False) -> RunConfig:
    """The configuration in a recipe, or in the `complete` file that a run saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not describe a run, or lacks a part though it should be complete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} the folder of a run?")
    parser = _recipe_parser()
    try:
        config = run_config(parser.instantiate(parser.parse_args(["--config", str(path.absolute())])))
    except Exception as error:  # the parsing library raises many kinds; all mean that the file is at fault
        raise ValueError(
            f"{path} is not the configuration of a run: {' '.join(condensed(str(error)).split())}"
        ) from error
    missing = [part.name for part in fields(RunConfig) if part.name not in (yaml.safe_load(path.read_text()) or {})]
    if complete and missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML that `load_config` and `--config` read."""
    write_atomically(path, yaml.safe_dump(plain(config), sort_keys=False))


def plain(value: Any) -> Any:
    """What YAML and JSON can hold, for a configuration or a part of one."""
    modules = {Solver: "deepeq", LayerConfig: "deepeq.models", Schedule: "deepeq.train"}
    module = next((module for base, module in modules.items() if isinstance(value, base)), None)
    if module is not None:
        arguments = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"class_path": f"{module}.{type(value).__name__}", "init_args": arguments}
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value

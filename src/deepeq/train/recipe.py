"""Recipes as YAML and as options of a command, and the folder that a run keeps its files in."""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from deepeq.adjoint import Adjoint, BackpropAdjoint, NeumannAdjoint, PhantomAdjoint
from deepeq.files import write_atomically
from deepeq.models import CellConfig, LayerConfig
from deepeq.solvers import GMRES, Anderson, Broyden, ConjugateGradient, FixedPointIteration, NewtonKrylov, Solver
from deepeq.train.config import RunConfig
from deepeq.train.recipe_text import check_file
from deepeq.train.schedules import Schedule

# A recipe may name the classes of this library and nothing else: a foreign one must not run code.
set_parsing_settings(
    import_path_denylist=["*"],
    import_path_allowlist=["deepeq"],
    docstring_parse_attribute_docstrings=True,
    add_print_completion_argument=True,
)

Resume = Literal["no", "yes", "auto"]
"""Whether a run continues from the newest checkpoint in its folder: never, always, or if there is one."""

RENAMED = {
    "data.level": "data.unit",
    "equilibrium.backward": "equilibrium.backward_solver",
    "equilibrium.evaluation": "equilibrium.eval_solver",
    "equilibrium.warm_up_share": "equilibrium.pretrain_fraction",
    "equilibrium.warm_up_depth": "equilibrium.pretrain_depth",
    "equilibrium.warm_up_depth_schedule": "equilibrium.pretrain_depth_schedule",
    "equilibrium.subsequence_len": "equilibrium.piece_len",
    "equilibrium.jacobian_share": "equilibrium.jacobian_fraction",
    "optimizer.warm_up_steps": "optimizer.lr_warmup_steps",
}
"""Fields of version 0.1, and what they are called now."""

_REJECTED = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does|[Dd]oes|does) not accept option '(?P<option>[\w.]+)'"
    r"|(?:unrecognized arguments|ambiguous option): (?P<dashes>--)(?P<argument>[\w.]+)"
    r"|Option '(?P<name>[\w.]+)' is not accepted"
)
_FIELD = re.compile(r"class_path '(?P<path>[\w.]+)':\s+Option '(?P<name>\w+)' is not accepted")
_CLASS = re.compile(
    r'key "(?P<key>[\w.]+)".*?(?:Expected a dot import path string: |class_path \')(?P<value>[\w.]+)', re.DOTALL
)
_CHOICE = re.compile(
    r'key "(?P<key>[\w.]+)":\s+Expected a typing\.Literal\[(?P<choices>.*?)\]\. Got value: (?P<value>.*)'
)
_TYPE = re.compile(r'key "(?P<key>[\w.]+)":\s+Expected a <class \'(?P<type>\w+)\'>\. Got value: (?P<value>.*)')
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_CHECKPOINT = re.compile(r"step-\d+")
_TEMPORARY = ".tmp"


def add_run_arguments(parser: ArgumentParser) -> None:
    """Give a parser `--config FILE` and an option for every field."""
    parser.add_argument("--config", action="config", help="a recipe, or the config.yaml of an earlier run")
    parser.add_class_arguments(RunConfig)
    # The default is another class than a recipe may name, and the parser would carry its options to that class.
    parser.set_defaults({"model.layer": None})


def run_config(values: Namespace) -> RunConfig:
    """Return the typed configuration that a parser with `add_run_arguments` read and instantiated."""
    return RunConfig(**{part.name: values[part.name] for part in fields(RunConfig)})


def load_config(path: Path, *, complete: bool = False) -> RunConfig:
    """Return the configuration in a recipe, or in the complete file that a run saved.

    Args:
        path: The YAML file.
        complete: Whether every part must be there, as in the file of a run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not describe a run, or lacks a part though it should be complete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} the folder of a run?")
    check_file(path)
    parser = recipe_parser()
    try:
        text = path.read_text(encoding="utf-8")
        config = run_config(parser.instantiate(parser.parse_string(text)))
    except Exception as error:  # the parsing library raises many kinds; all mean that the file is at fault
        raise ValueError(f"{path} is not the configuration of a run: {short_error(str(error))}") from error
    missing = [part.name for part in fields(RunConfig) if part.name not in (yaml.safe_load(text) or {})]
    if complete and missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML that `load_config` and `--config` read."""
    write_atomically(path, yaml.safe_dump(to_plain(config), sort_keys=False))


@cache
def recipe_parser() -> ArgumentParser:
    """Return the parser of all recipes; building one takes longer than parsing a recipe."""
    parser = ArgumentParser(exit_on_error=False)
    add_run_arguments(parser)
    return parser


def to_plain(value: Any) -> Any:
    """Return a configuration, or a part of one, as what YAML and JSON can hold."""
    modules = {Solver: "deepeq", Adjoint: "deepeq", LayerConfig: "deepeq.models", Schedule: "deepeq.train"}
    module = next((module for base, module in modules.items() if isinstance(value, base)), None)
    if module is not None:
        arguments = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
        return {"class_path": f"{module}.{type(value).__name__}", "init_args": arguments}
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def short_error(message: str, options: str = "") -> str:
    """Reduce an error of the parsing library to a sentence about the user's mistake.

    Args:
        message: The error.
        options: Help text of the command, in which the names of its options stand. The default is that of a recipe.
    """
    if (found := _FIELD.search(message)) is not None:
        path, name = found.groups()
        known = [part.name for part in fields(_class(path))]
        return f"{path} has no field {name!r}; {_nearest(name, known) or 'it has ' + ', '.join(known)}"
    if (found := _REJECTED.search(message)) is not None:
        dashes = found["dashes"] or ""
        name = ".".join(found[part] for part in ("group", "option", "argument", "name") if found[part])
        old = ".".join(name.split(".")[:2])
        if old in RENAMED:
            return f"{old} of version 0.1 is now called {RENAMED[old]}; rename it"
        known = re.findall(r"--([\w.]+)", options or recipe_parser().format_help())
        hint = _nearest(name, known, dashes) or f"{dashes}help lists them" if dashes else _nearest(name, known)
        return f"there is no {'option' if dashes else 'field'} {dashes}{name}{hint and '; ' + hint}"
    if (found := _CHOICE.search(message)) is not None:
        choices = found["choices"].replace("'", "")
        return f"{found['key']}={found['value']!r} must be one of {choices}"
    if (found := _TYPE.search(message)) is not None:
        return f"{found['key']}={found['value']!r} must be {_TYPES.get(found['type'], found['type'])}"
    found = _CLASS.search(message)
    if found is not None and found["value"].rpartition(".")[2] not in _classes(found["key"]):
        return f"{found['key']}={found['value']!r} must be one of {', '.join(_classes(found['key']))}"
    before, union, rest = message.partition("Does not validate against any of the Union subtypes")
    if union:
        errors = rest.partition("Errors:")[2].partition("Given value type:")[0]
        sentences = [" ".join(part.split()) for part in re.split(r"\n *- ", errors)]
        message = f"{before} {'; '.join(part for part in sentences if part and 'NoneType' not in part)}"
    return " ".join(message.split())


def _nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Return a question for the known name that is most like a wrong one, or an empty string."""
    known = list(known)
    ends = [each for each in known if each.endswith(f".{name}")]
    near = ends[:1] or get_close_matches(name, known, n=1)
    return f"did you mean {dashes}{near[0]}?" if near else ""


def _classes(key: str) -> list[str]:
    """Return the names of the classes that a field takes."""
    if key.endswith("solver"):
        linear = [GMRES, ConjugateGradient] if key.endswith("backward_solver") else []
        kinds: Sequence[type] = [Anderson, Broyden, FixedPointIteration, NewtonKrylov, *linear]
    elif key.endswith("adjoint"):
        kinds = [PhantomAdjoint, NeumannAdjoint, BackpropAdjoint]
    elif key.endswith("schedule"):
        kinds = Schedule.__subclasses__()
    else:
        kinds = [kind for base in (LayerConfig, CellConfig) for kind in base.__subclasses__() if kind != CellConfig]
    return [kind.__name__ for kind in kinds]


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


class RunFolder:
    """The files of a run, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoint"
        self.best = path / "best"
        self.figures = path / "figures"
        self.sample = path / "sample.txt"
        self.result = path / "result.json"

    @classmethod
    def of(cls, config: RunConfig, resume: Resume) -> Self:
        """Return the folder that a run is to use.

        Raises:
            ValueError: The folder holds a run already, or there is none to resume.
        """
        if resume != "no" and config.run.dir is None:
            raise ValueError(f"resume={resume!r} needs run.dir, the folder of the run to continue")
        name = f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = cls(Path(config.run.dir) if config.run.dir is not None else Path("runs") / name)
        if resume != "no":
            folder.refuse_old()
        if resume == "yes" and folder.last is None:
            place = folder.checkpoints.absolute()
            raise ValueError(f"there is no checkpoint in {place}; start the run with --resume auto or no")
        if resume == "no" and (folder.checkpoints.exists() or folder.best.exists()):
            raise ValueError(
                f"{folder.path} already holds a run; add --resume auto to continue it, or choose another --run.dir"
            )
        return folder

    def refuse_old(self) -> None:
        """Raise ValueError if the checkpoints here are those of version 0.1."""
        old = next(self.checkpoints.glob("*.safetensors"), None)
        if old is not None:
            raise ValueError(
                f"{old} is a checkpoint of version 0.1, which this version does not read; train again from "
                f"{self.config}, or use version 0.1"
            )

    @property
    def saved(self) -> list[Path]:
        """Complete checkpoints to continue from, the oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name))

    @property
    def last(self) -> Path | None:
        """The newest checkpoint to continue from."""
        return self.saved[-1] if self.saved else None

    def at_step(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:09d}"

    def keep(self, count: int) -> None:
        """Delete all but the newest checkpoints; one that is half deleted does not keep its name."""
        for path in self.saved[:-count]:
            doomed = path.rename(path.with_name(f"old-{path.name}{_TEMPORARY}"))
            shutil.rmtree(doomed)

    def remove_temporary(self) -> None:
        """Delete what killed processes left among the checkpoints."""
        for path in self.checkpoints.glob(f"*{_TEMPORARY}"):
            shutil.rmtree(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            ValueError: Another process is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", blocking=False):
                yield
        except Timeout as error:
            raise ValueError(f"another process is training in {self.path}; choose another --run.dir") from error

"""Where the curves of a run go: to TensorBoard, and to Weights & Biases if a project is named."""

import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

# This import brings no wandb: the logger imports it at its first use, because that takes time and few have it.
from lightning.pytorch.loggers.wandb import WandbLogger

from deepeq.data.files import write_atomically
from deepeq.train.config import RunConfig, plain


def make_loggers(config: RunConfig, folder: Path, step: int) -> list[Logger]:
    """The loggers of a run, for the process that writes its metrics; `finalize` of each is for the end of the run.

    TensorBoard hides what an earlier process logged after `step`. Weights & Biases goes on with the run of the earlier
    process, whose id lies in the folder; with WANDB_MODE=offline it needs no network.

    Args:
        config: The run; `train.wandb_project` names the project.
        folder: Where the curves are written.
        step: The step that the run goes on from, 0 for a new one.

    Raises:
        ValueError: a project is named, but wandb is not installed.
    """
    # What was logged at `step` itself was logged before its checkpoint, and stays.
    loggers: list[Logger] = [_TensorBoard(root_dir=folder, name="", version="", purge_step=step + 1)]
    project = config.train.wandb_project
    if project is None:
        return loggers
    name = folder.resolve().name
    try:
        wandb = _Wandb(project=project, name=name, save_dir=folder, id=_run_id(folder, step), config=plain(config))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"train.wandb_project={project!r} needs the package wandb: pip install wandb, or leave it out"
        ) from error
    return [*loggers, wandb]


@contextmanager
def quiet_writers() -> Iterator[None]:
    """No traceback of a thread that could not write: TensorBoard raises its error again at the next call."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            usual(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class _TensorBoard(TensorBoardLogger):
    @property
    def log_dir(self) -> str:
        # The base class would replace `$NAME` and `~` in the name of the folder.
        return self.root_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:  # what the base class makes of any error
            if isinstance(error.__cause__, OSError):
                raise OSError(f"the curves in {self.root_dir} cannot be written: {error.__cause__}") from error
            raise


class _Wandb(WandbLogger):
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            # Otherwise the next run of this process would be written to this one.
            self._experiment.finish()


def _run_id(folder: Path, step: int) -> str:
    path = folder / "wandb_id.txt"
    if step and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, run_id)
    return run_id

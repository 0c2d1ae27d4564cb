"""Writes what a run does as JSON lines beside its model, and to the trackers that were asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkft_fx.errors import OptionError
from chunkft_fx.tools.models.evaluate import Score
from chunkft_fx.tools.training.loop import StepInfo

FILE = "log.jsonl"
# The classes of Accelerate for what a run can be tracked with, which are packages of the same name.
TRACKERS = {
    "tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "mlflow": "MLflowTracker",
    "comet_ml": "CometMLTracker", "swanlab": "SwanLabTracker", "trackio": "TrackioTracker", "aim": "AimTracker",
    "clearml": "ClearMLTracker", "dvclive": "DVCLiveTracker",
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Raise `OptionError` for a tracker that is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise OptionError(f"track is {name}; it must be one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"track is {name}, which is not installed; run: pip install {name}")


class Log:
    """The log of a run in the folder of its model: a line for each step, and one for each score."""

    def __init__(self, out: Path, trackers: Sequence[Any] = ()) -> None:
        self.path = out / FILE
        self.trackers = trackers

    def begin(self, step: int) -> None:
        """Keep what is there of the steps up to this one: a run that was killed has logged more than it saved."""
        before = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line for line in before if _step_of(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def step(self, info: StepInfo) -> None:
        """Log a step."""
        values = {name: value for name, value in asdict(info).items() if value is not None}
        self._write(values.pop("step"), values)

    def score(self, step: int, score: Score) -> None:
        """Log a score on held-out rows."""
        self._write(step, {f"eval_{name}": value for name, value in asdict(score).items() if value is not None})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _step_of(line: str) -> float:
    """The step of a line; one that was cut off is of none that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


@contextlib.contextmanager
def tracking(names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """The log of a run that begins, with Accelerate's trackers of these names, closed at the end."""
    import accelerate

    trackers: list[Any] = []
    try:
        for name in names:
            kind = getattr(accelerate.tracking, TRACKERS[name])
            place = {"logging_dir": out} if kind.requires_logging_directory else {}
            trackers.append(kind("runs" if place else out.name, **place))
            trackers[-1].start()
            trackers[-1].store_init_configuration({k: v if _is_plain(v) else str(v) for k, v in settings.items()})
        yield Log(out, trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))

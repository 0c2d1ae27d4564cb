"""Holds one error class for every mistake a user can make; each message says what, where and what to change."""

from __future__ import annotations

from collections.abc import Mapping


class ChunkFTError(Exception):
    """Base class of every error that this library raises on purpose."""


class ChunkFTWarning(UserWarning):
    """Training goes on, but not as its user may expect; the message says what to do."""


class BudgetParseError(ChunkFTError, ValueError):
    """A budget is not a positive number of bytes such as ``"24GB"`` or ``"24GiB"``."""


class BudgetInfeasible(ChunkFTError):
    """No schedule fits the budget.

    ``smallest_budget_bytes`` is the smallest budget that was found feasible; ``terms`` maps each
    part of the predicted peak of that schedule to its bytes, largest first.
    """

    def __init__(self, message: str, smallest_budget_bytes: int, terms: Mapping[str, int]) -> None:
        super().__init__(message)
        self.smallest_budget_bytes = smallest_budget_bytes
        self.terms = dict(terms)


class ChunkCountError(ChunkFTError, ValueError):
    """``chunks`` is below 1, or above the number of pieces that the parameters can be cut into."""


class OptionError(ChunkFTError, ValueError):
    """An option of a public function has a value outside its documented set."""


class UnsupportedGraph(ChunkFTError):
    """The model cannot be captured as one exact joint graph; the message carries torch's own reason."""


class NoTrainableParameters(ChunkFTError):
    """No parameter of the model has ``requires_grad=True``."""


class UninitializedParameters(ChunkFTError, ValueError):
    """A parameter has no shape yet, because its lazy module has not been called."""


class AlreadyCompiled(ChunkFTError, TypeError):
    """The model was already compiled, by this library or by ``torch.compile``."""


class LogitsNotKept(ChunkFTError, AttributeError, TypeError):
    """Logits were read that training did not keep; ``return_logits=True`` keeps them.

    An `AttributeError`, so that ``hasattr`` finds nothing where nothing is, and a `TypeError`, as ``None`` would give.
    """


class NotPlanned(ChunkFTError):
    """The plan depends on the batch shape and no training batch has been seen yet."""


class OptimizerMismatch(ChunkFTError, TypeError):
    """The optimizer was given something other than a module returned by ``chunkft_fx.compile``."""


class OptimizerNotSupported(ChunkFTError, TypeError):
    """A class of torch optimizers cannot be run over the slices of a compiled module."""


class HostMemoryExceeded(ChunkFTError, MemoryError):
    """Optimizer states or gradients need more host memory (``needed_bytes``) than they may take (``limit_bytes``)."""

    def __init__(self, message: str, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class PartialStep(ChunkFTError):
    """A step that updates piece by piece failed halfway: some parameters are a step ahead of the others."""


class StaleBackward(ChunkFTError, RuntimeError):
    """Backward was called for a forward whose chunk, weights or buffers are gone."""


class CheckpointMismatch(ChunkFTError, ValueError):
    """A checkpoint belongs to another model, optimizer or layout."""


class DataError(ChunkFTError, ValueError):
    """Training data is missing, empty or not readable as text."""


class ModelUnusable(ChunkFTError):
    """Files of a model are missing, damaged, or not all there."""


class TrainingDiverged(ChunkFTError, ArithmeticError):
    """A loss or a weight is not a finite number."""


class SaveFailed(ChunkFTError, OSError):
    """A checkpoint or a model could not be written; what was saved before is as it was."""


class FolderInUse(ChunkFTError, RuntimeError):
    """Another process is writing to the folder."""


class VerificationError(ChunkFTError):
    """A graph pass broke an invariant: a defect of this library, never of the user's model."""


class SliceGradientError(ChunkFTError, RuntimeError):
    """An operation on the gradient of a slice would need the gradient of the whole parameter."""


class WaitingGradientError(ChunkFTError, RuntimeError):
    """A gradient that waits in host memory cannot be used so, or is not what it was any more."""


class UsedGradientError(ChunkFTError, RuntimeError):
    """A gradient was read that the backward has used already, for its update."""


class DoubleBackward(ChunkFTError, RuntimeError):
    """A gradient was asked for that can itself be differentiated (``create_graph=True``)."""


class OutsideGradient(ChunkFTError, RuntimeError):
    """The gradients of a step did not come through the compiled module."""


class NoGradientToScale(ChunkFTError, RuntimeError):
    """A gradient scaler was to step for a chunk of which no slice got a gradient."""


class OptimizerConflict(ChunkFTError, RuntimeError):
    """Another optimizer is to update parameters that a compiled module trains."""


class ModelChanged(ChunkFTError, RuntimeError):
    """Parameters or modules of the model changed in a way that a run which has begun cannot follow."""


class DistributedNotSupported(ChunkFTError, RuntimeError):
    """A compiled module was to run on several ranks, or inside DistributedDataParallel or FSDP."""


class RankFailed(ChunkFTError, RuntimeError):
    """Another rank failed, or its process ended, while this one waited for it; the message says which one."""


class RanksDisagree(ChunkFTError, RuntimeError):
    """Ranks that train one model together were given different models, options, or calls."""


class UnsupportedParameter(ChunkFTError, TypeError):
    """A trainable parameter has a dtype or a kind that cannot be trained here."""

"""Full-parameter fine-tuning inside a byte budget: one chunk of the parameters trains at a time."""

from chunkft_fx import errors
from chunkft_fx.api import compile
from chunkft_fx.checkpoints.load import Loaded, load
from chunkft_fx.checkpoints.save import save
from chunkft_fx.checkpoints.saving import wait_for_saves
from chunkft_fx.logs import enable_logs
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.classes.torch_optimizer import optimizer
from chunkft_fx.optim.rules.adafactor import Adafactor
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.optim.rules.sgd import SGD
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.plan import Plan
from chunkft_fx.ranks.losses import mean_over_ranks
from chunkft_fx.trainers.attach import attach

__version__ = "0.1.0"
__all__ = [
    "SGD", "Adafactor", "AdamW", "Chunk", "CompiledModule", "Loaded", "Plan", "Slice", "attach", "compile", "errors",
    "load", "mean_over_ranks", "optimizer", "save", "wait_for_saves",
]  # fmt: skip

enable_logs()  # as $CHUNKFT_LOGS says

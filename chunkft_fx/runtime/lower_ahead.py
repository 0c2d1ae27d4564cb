"""Lowers the graphs of the step that is about to run in a thread of its own, while weights are put in their places."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from chunkft_fx.program.lower import lower
from chunkft_fx.program.variants import Variant

THREAD = "chunkft-lower-ahead"

log = logging.getLogger("chunkft_fx.runtime.lower_ahead")


@contextlib.contextmanager
def lowered_beside(variants: Sequence[Variant], backend: str, fake_mode: Any, device: torch.device) -> Iterator[None]:
    """While inside, a thread lowers both directions of these variants in the order of a step; on exit it is done.

    Inside, nothing may be lowered or run. After an exception inside, the thread ends with the graph that it is at. What
    cannot be lowered is left to the step, which tries again and raises where its caller sees it.
    """
    stopped = threading.Event()
    wanted = [(v, False) for v in variants] + [(v, True) for v in reversed(variants) if v.backward is not None]

    def work() -> None:
        # a new thread has gradients enabled and the first device, a step's forward and backward have neither
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for variant, is_backward in wanted:
                if stopped.is_set():
                    return
                lower(variant, backend, fake_mode, is_backward)

    def quietly() -> None:
        try:
            work()
        except Exception as error:
            log.debug("left to the step: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=quietly, name=THREAD, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        thread.join()

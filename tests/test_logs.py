"""``CHUNKFT_LOGS`` turns on the loggers it names, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from chunkft_fx.logs import enable_logs

NAMES = ("chunkft_fx", "chunkft_fx.passes", "chunkft_fx.runtime.step")


@pytest.fixture(autouse=True)
def quiet_loggers() -> Iterator[None]:
    before = [(logging.getLogger(n), logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in NAMES]
    for logger, _, _ in before:
        logger.setLevel(logging.NOTSET)
        logger.handlers = []
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


def _is_on(name: str) -> bool:
    return logging.getLogger(name).isEnabledFor(logging.DEBUG)


def test_named_loggers_are_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKFT_LOGS", "passes, ")
    enable_logs()
    assert _is_on("chunkft_fx.passes")
    assert not _is_on("chunkft_fx.runtime.step")


def test_all_turns_on_every_logger() -> None:
    enable_logs("all")
    assert all(_is_on(name) for name in NAMES)


def test_nothing_is_turned_on_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKFT_LOGS", raising=False)
    enable_logs()
    assert not any(_is_on(name) for name in NAMES)


def test_a_second_call_prints_no_line_twice(capsys: pytest.CaptureFixture[str]) -> None:
    enable_logs("passes")
    enable_logs("passes")
    logging.getLogger("chunkft_fx.passes").debug("once")
    assert capsys.readouterr().err.count("once") == 1

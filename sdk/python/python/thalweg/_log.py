"""Logging, through the standard library, as the logger `thalweg`."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from . import _native

logger = logging.getLogger("thalweg")


class Adapter(logging.LoggerAdapter[logging.Logger]):
    """Puts rank and round before a message, and into the record as `rank`, `round` and `job`."""

    def __init__(self, job: str, rank: int) -> None:
        super().__init__(logger, {"job": job, "rank": rank, "round": 0})
        self.values: dict[str, Any] = {"job": job, "rank": rank, "round": 0}

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**self.values, **kwargs.get("extra", {})}
        return f"[{self.values['job']} rank {self.values['rank']} round {self.values['round']}] {msg}", kwargs


# The job whose call is waiting in this thread's process, for what the SDK logs meanwhile.
_current: Adapter | None = None


def current(adapter: Adapter) -> None:
    """Says whose rank and round go with what the SDK logs from now on."""
    global _current
    _current = adapter


def _deliver(level: int, text: str) -> None:
    (_current or logger).log(level, text)


_native.set_log_sink(_deliver)

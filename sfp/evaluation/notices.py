"""Keeps OpenMMLab's advice to developers off the terminal of people who evaluate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger


@contextmanager
def quiet() -> Iterator[None]:
    """For a block, or as a decorator `@quiet()` for a function; errors still show.

    mmengine's default logger is meant, which speaks until a run brings its own.
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mm(engine|seg|cv)\b")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

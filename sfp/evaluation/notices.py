"""Suppresses OpenMMLab's notices for developers during an evaluation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses notices in a block, or in a function as the decorator `@quiet()`; keeps errors.

    This concerns mmengine's default logger, which is used until a run creates its own.
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

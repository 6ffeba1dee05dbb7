"""Checks that tensors fit into memory, before the system kills the process."""

from __future__ import annotations

import os

import torch


class RoomError(ValueError):
    """Raised for something that needs more memory than there is."""


def memory(device: torch.device) -> int | None:
    """Total memory of a device in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def check_room(numbers: int, device: torch.device, what: str, instead: str) -> None:
    """Raises an error if float32 numbers need more than the total memory of a device.

    Args:
        numbers: count of numbers in memory at once.
        device: the device.
        what: what needs them, for the message.
        instead: advice for the message.

    Raises:
        RoomError: if they cannot fit.
    """
    room = memory(device)
    if room is not None and 4 * numbers > room:
        raise RoomError(
            f"{what} takes about {4 * numbers / 2**30:.0f} GiB, but the {device.type.upper()} has "
            f"{room / 2**30:.0f}: {instead}"
        )

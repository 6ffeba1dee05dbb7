"""Refuses what does not fit into memory, before the system ends the process for it."""

from __future__ import annotations

import os

import torch


class RoomError(ValueError):
    """Something that needs more memory than there is."""


def memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, in use or not; None where they cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def check_room(numbers: int, device: torch.device, what: str, instead: str) -> None:
    """Refuses so many float32 numbers if the device has less memory in all.

    Args:
        numbers: that are held at once.
        device: where.
        what: needs them, for the message.
        instead: what to do.

    Raises:
        RoomError: if they cannot fit.
    """
    room = memory(device)
    if room is not None and 4 * numbers > room:
        raise RoomError(
            f"{what} takes about {4 * numbers / 2**30:.0f} GiB, the {device.type.upper()} has "
            f"{room / 2**30:.0f}: {instead}"
        )

"""Numbers that the host made, on their way to the device."""

from __future__ import annotations

import torch


def on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. Does not wait for it."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)

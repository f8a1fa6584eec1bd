"""In which precision a forward pass runs: what the device has in hardware, and islands of full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs under bfloat16 autocast. `auto`: where the device has it in hardware."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """True if the processor multiplies bfloat16 matrices in hardware (Linux; False where that cannot be told)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def autocast(device_type: str, bfloat16: bool) -> AbstractContextManager[Any]:
    """The precision of a forward pass. The meta device, of a count of costs, knows none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, torch.bfloat16, bfloat16)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Full precision inside, on whichever device."""
    with ExitStack() as off:
        for device_type in ("cuda", "mps", "cpu"):
            if torch.is_autocast_enabled(device_type):
                off.enter_context(torch.autocast(device_type, enabled=False))
        yield

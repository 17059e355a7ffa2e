"""Whether a group's ports and GPUs can be had: looked at before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..model.errors import SpecError
from ..processes.tcp_ports import holders, is_free, listening_sockets, taken_by


def check_free(ports: Sequence[int]) -> None:
    """Whether a group's `ports` are its own to take. Raises `SpecError`, with who has it."""
    for at, port in enumerate(ports):
        if not is_free(port):
            remedy = "end that first, or use another port" if listening_sockets(port) else "use another port"
            raise SpecError(f"ports[{at}]", port, taken_by(holders(port)), remedy)


def check_gpus(wanted: Collection[int | str]) -> None:
    """Whether a group's GPUs are here, where that can be known. Raises `SpecError`."""
    if not wanted:
        return
    from .. import gpu  # takes 20 ms to load, which only those wait for who have one

    try:
        found = gpu.inventory()
    except (gpu.DeviceUnavailable, MemoryError) as exc:
        if isinstance(exc, gpu.DeviceUnavailable) and exc.reason is gpu.Reason.NO_EXTRA:
            return
        raise SpecError("Placement.gpus", list(wanted), f"cannot be had: {exc}", "leave them out") from None
    for one in wanted:
        meant = [(device, uuid) for device in found for uuid in gpu.meant(one, device)]
        if not meant:
            there = ", ".join(device.uuid or device.trouble for device in found) or "none"
            raise SpecError("Placement.gpus", one, "is not a GPU of this machine", f"there are {len(found)}: {there}")
        if len(meant) > 1:
            raise SpecError("Placement.gpus", one, f"is the beginning of {len(meant)} UUIDs", "give more of it")
        if meant[0][0].trouble:
            raise SpecError("Placement.gpus", one, f"cannot be had: {meant[0][0].trouble}", "leave it out")

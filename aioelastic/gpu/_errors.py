"""What may go wrong with GPUs."""

from __future__ import annotations

from enum import Enum

from ..memory import NotShareable, SharingError

# of CUresult, cuda.h: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
CAPTURED, CAPTURED_IMPLICITLY = _CAPTURES = 900, 906
# those after which "any further CUDA work will return the same error", or "the context cannot be used anymore"
_FOR_GOOD = {226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911}


class Reason(Enum):
    """Why a GPU, or something of it, cannot be used here."""

    NO_EXTRA = "cuda-python is not installed: pip install 'aioelastic[gpu]'"
    NO_DRIVER = "NVIDIA's driver library (libcuda.so.1) is not here: install the driver, or give the container the GPU"
    NO_GPU = "the driver is here, and no GPU"
    NOT_VISIBLE = "this process does not see that GPU: look at CUDA_VISIBLE_DEVICES, here and where it came from"
    TOO_OLD = "the driver is too old for it"
    NO_VMM = "this GPU or its driver has no virtual memory management (cuMemCreate)"
    NO_POSIX_FD = "memory of this GPU cannot be exported as file descriptors here"
    REFUSED = "the driver refused"
    NO_ROOM = "there is no room for it now: the GPU's memory, or a limit of this process, is used up"


class DeviceUnavailable(SharingError):
    """A GPU cannot be used here.

    Attributes:
        reason: why, a `Reason`; its value says it in words.
        detail: what was asked for, or what the driver said.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail}: {self.reason.value}" if self.detail else self.reason.value


class ForkedCudaError(SharingError):
    """CUDA was used before this process was forked from another: it cannot be used here."""

    def __init__(self) -> None:
        super().__init__(
            "CUDA was initialised before fork(2), so it cannot be used in this process; "
            'start it as a worker with start="zygote" or "spawn"'
        )

    def __reduce__(self) -> tuple[type[ForkedCudaError], tuple[()]]:
        return (ForkedCudaError, ())


class ReshareError(NotShareable):
    """Memory that another library has imported from another process: only who allocated it can share it."""


class CudaError(SharingError):
    """The driver refused a call.

    Attributes:
        call: its name.
        status: its number; `cuda.h`, CUresult.
        name: that of the number.
        words: what the driver says of it.
    """

    def __init__(self, call: str, status: int, name: str, words: str) -> None:
        super().__init__(call, status, name, words)
        self.call = call
        self.status = status
        self.name = name
        self.words = words

    @property
    def for_good(self) -> bool:
        """Whether the context of this process is broken, where nothing runs any more and all calls will fail."""
        return self.status in _FOR_GOOD

    def __str__(self) -> str:
        remedy = "; do it when the capture of the graph has ended" if self.status in _CAPTURES else ""
        return f"{self.call}: {self.name} ({self.status}), {self.words}{remedy}"

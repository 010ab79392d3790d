"""Memory that the process has freed, but not given back."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can.

    Compiling allocates hundreds of megabytes in small parts and frees them. glibc
    keeps those for later, and beside the buffers of a step they are never needed.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

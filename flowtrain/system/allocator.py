"""glibc's `malloc`, told to keep what is freed."""

import ctypes

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_MIB = 2**20


def keep_freed_memory() -> bool:
    """Freed tensors stay with the process, for the next ones; returns whether the C library agreed.

    By default glibc gives blocks above a threshold, which it raises to 32 MiB at most, back to the
    system as soon as they are free, and likewise the end of its heap; the next step, or batch of
    samples, faults the same pages in again, which is a quarter of the time of sampling. The
    memory's peak is the same, but the process stays there.

    Call it before tensors are made. It does nothing where the C library is not glibc (musl, macOS,
    Windows).
    """
    try:
        libc = ctypes.CDLL(None)
        # Other libraries give the numbers of mallopt another meaning.
        libc.gnu_get_libc_version  # noqa: B018
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older versions refuse (with 0) more than 32 MiB, half of what a thread's heap may hold.
    mapped = mallopt(_M_MMAP_THRESHOLD, 1024 * _MIB) or mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
    trimmed = mallopt(_M_TRIM_THRESHOLD, -1)  # never
    return bool(mapped and trimmed)

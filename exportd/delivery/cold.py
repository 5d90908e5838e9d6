"""Cold pages: detects pages of a file that are not in memory, and reads them in threads.

``sendfile`` and ``read`` wait for the disk and block the event loop. A read with ``RWF_NOWAIT`` reports
within about a microsecond whether it would wait. It is only a hint: it may report that for other reasons,
such as a pending write of the access time. So pages that a thread has read are not checked again.
"""

import asyncio
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
# More readers do not make one disk faster. Each holds one slice in memory.
_THREADS = 8
# How far ahead the kernel is asked to read.
_READ_AHEAD_BYTES = 4 * 1024 * 1024

_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="exportd-cold")
_scratch = threading.local()


def read_resident(descriptor: int, offset: int, size: int) -> bytes | None:
    """Returns up to ``size`` bytes if that needs no waiting, else None; None also if the system cannot tell.

    Raises OSError.
    """
    if not _NO_WAIT:
        return None
    buffer = bytearray(size)
    try:
        count = os.preadv(descriptor, [buffer], offset, _NO_WAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    return bytes(memoryview(buffer)[:count])


async def read(descriptor: int, offset: int, size: int) -> tuple[bytes, bool]:
    """Like ``os.pread``, but never blocks the loop. Also returns whether it needed a thread. Raises
    OSError."""
    data = read_resident(descriptor, offset, size)
    if data is not None:
        return data, False
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, _read_and_go_on, descriptor, offset, size), True


def is_resident(descriptor: int, offset: int, size: int) -> bool:
    """Whether these bytes are probably in memory: checks the first and the last page.

    Raises OSError.
    """
    return bool(
        size
        and read_resident(descriptor, offset, 1) is not None
        and read_resident(descriptor, offset + size - 1, 1) is not None
    )


async def make_resident(descriptor: int, offset: int, size: int) -> None:
    """Reads these bytes into memory, and asks the kernel to read ahead. Raises OSError."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(_threads, _touch, descriptor, offset, size)


def _read_and_go_on(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    _ask_for(descriptor, offset + size)
    return data


def _touch(descriptor: int, offset: int, size: int) -> None:
    _ask_for(descriptor, offset + size)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = bytearray(size)
    with memoryview(buffer) as view:
        done = 0
        while done < size:
            count = os.preadv(descriptor, [view[done:size]], offset + done)
            if not count:
                return
            done += count


def _ask_for(descriptor: int, offset: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

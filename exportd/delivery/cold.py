"""Pages that are not in memory: asked about before they are needed, and fetched where waiting harms nobody.

``sendfile`` and ``read`` wait for the disk, and with them the whole loop. A read with ``RWF_NOWAIT`` tells in
about a microsecond whether it would have to wait. It is a hint only: it may also say so for other reasons,
such as an access time to be written, so what it sends to the threads is not asked about a second time.
"""

import asyncio
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
# One disk gains nothing from more readers than this; each holds one slice of memory.
_THREADS = 8
# How far the kernel is asked to read beyond what is needed now.
_READ_AHEAD_BYTES = 4 * 1024 * 1024

_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="exportd-cold")
_scratch = threading.local()


def read_resident(descriptor: int, offset: int, size: int) -> bytes | None:
    """Up to ``size`` bytes, if they can be had without waiting; None where they cannot, or nobody can tell.

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
    """As ``os.pread``, without ever blocking the loop; and whether that took a thread. Raises OSError."""
    data = read_resident(descriptor, offset, size)
    if data is not None:
        return data, False
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, _read_and_go_on, descriptor, offset, size), True


def is_resident(descriptor: int, offset: int, size: int) -> bool:
    """Whether sending these bytes would likely not wait: judged by the first page and the last.

    Raises OSError.
    """
    return bool(
        size
        and read_resident(descriptor, offset, 1) is not None
        and read_resident(descriptor, offset + size - 1, 1) is not None
    )


async def make_resident(descriptor: int, offset: int, size: int) -> None:
    """Brings these bytes into memory, and asks the kernel for those behind them. Raises OSError."""
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

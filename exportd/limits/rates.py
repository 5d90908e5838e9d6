"""Request rates by the generic cell rate algorithm (ITU-T I.371), in a table of fixed size.

A name's slot holds its theoretical arrival time. Names share sets of eight slots. If a set is full, the name
that was idle longest loses its slot, and so its past requests no longer count.
"""

import hashlib
import time

from exportd.limits.memory import RATE_SLOTS, SharedMemory

_WAYS = 8
_MINUTE = 60.0


class Rates:
    """Counts requests of all processes. Two processes that count a name at the same instant may count
    once."""

    def __init__(self, shared: SharedMemory) -> None:
        half = len(shared.rates) // 2
        self._names = shared.rates[:half].cast("Q")
        self._times = shared.rates[half:].cast("d")
        self._key = shared.key

    def take(self, name: str, per_minute: int, now: float | None = None) -> float:
        """Counts a request of ``name``, which may make ``per_minute`` at once and as many in each minute.

        Returns 0.0, or the seconds to wait if the request is over the limit.
        """
        now = time.monotonic() if now is None else now
        interval = _MINUTE / per_minute
        slot, is_known = self._find(name)
        used_up_at = max(self._times[slot], now) if is_known else now
        if (wait := used_up_at - now - (_MINUTE - interval)) > 1e-6:
            return wait
        self._times[slot] = used_up_at + interval
        return 0.0

    def _find(self, name: str) -> tuple[int, bool]:
        name_bytes = name.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(name_bytes, digest_size=16, key=self._key).digest()
        wanted = int.from_bytes(digest[:8], "little") or 1
        first = int.from_bytes(digest[8:], "little") % (RATE_SLOTS // _WAYS) * _WAYS
        slots = range(first, first + _WAYS)
        for slot in slots:
            if self._names[slot] == wanted:
                return slot, True
        quietest = min(slots, key=self._times.__getitem__)
        self._names[quietest] = wanted
        return quietest, False

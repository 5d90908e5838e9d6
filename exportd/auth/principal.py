"""Who is asking."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Principal:
    """The bearer of a verified token, which is good until ``expires_at`` (seconds since the epoch)."""

    user_id: str
    is_admin: bool
    expires_at: float = field(default=math.inf, compare=False)

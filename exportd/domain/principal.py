"""Who is asking."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Principal:
    """The bearer of a verified token, which is good until ``expires_at`` (seconds since the epoch).

    ``by_link``: whoever has a link that the user made, and perhaps nobody the user knows.
    """

    user_id: str
    is_admin: bool
    expires_at: float = field(default=math.inf, compare=False)
    by_link: bool = False

"""The authenticated caller."""

import math
from dataclasses import dataclass, field, replace
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Principal:
    """The user of a verified token, which is valid until ``expires_at`` (seconds since the epoch).

    ``by_link``: the caller has a link that the user made, and may be anybody.
    """

    user_id: str
    is_admin: bool
    expires_at: float = field(default=math.inf, compare=False)
    by_link: bool = False

    def with_uuid(self) -> "Principal":
        """The same user, whose id is written as PostgreSQL writes a UUID, if it is one."""
        try:
            return replace(self, user_id=str(UUID(self.user_id)))
        except ValueError:
            return self

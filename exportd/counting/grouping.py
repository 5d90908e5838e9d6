"""Which events go into one statement."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from uuid import UUID

from exportd.domain.delivery import DownloadEvent, Outcome

MAX_BATCH_SIZE = 500
# The most partial deliveries of one principal in a statement. Each is compared with every other.
_MAX_SHARE = 50


def one_statement() -> Callable[[DownloadEvent], bool]:
    """Returns a function that tells whether an event may join the statement. It bounds the statement's
    work and keeps each principal's order."""
    taken: set[UUID] = set()
    partial: Counter[tuple[UUID, str]] = Counter()
    # Principals with a waiting event, which later events must not overtake.
    overtaken: set[tuple[UUID, str]] = set()

    def may_join(event: DownloadEvent) -> bool:
        principal = (event.job_id, event.user_id)
        is_full = len(taken) == MAX_BATCH_SIZE or partial[principal] == _MAX_SHARE
        if is_full or principal in overtaken or event.event_id in taken:
            overtaken.add(principal)
            return False
        partial[principal] += not event.is_whole
        taken.add(event.event_id)
        return True

    return may_join


def next_group(
    waiting: Sequence[DownloadEvent], suspect: Collection[UUID], rejected: Collection[UUID]
) -> list[DownloadEvent]:
    """Returns the events of the next statement: no rejected job, and a suspect job only alone."""
    chosen = list(
        itertools.islice((event for event in waiting if event.job_id not in suspect), MAX_BATCH_SIZE)
    )
    if not chosen:
        alone = next((event.job_id for event in waiting if event.job_id not in rejected), None)
        chosen = list(itertools.islice((event for event in waiting if event.job_id == alone), MAX_BATCH_SIZE))
    if running := [event for event in chosen if event.outcome == Outcome.RUNNING]:
        return running
    may_join = one_statement()
    return [event for event in chosen if may_join(event)]

"""The rule of counting. A download counts when one principal has received every byte of a package.

``add`` judges one delivery of a principal:

1. A delivery in which the client acknowledged the whole package is a download. The progress starts anew.
2. Any other delivery joins the progress: the acknowledged bytes are received.
3. A client may have more than it acknowledged before its delivery broke off, because acknowledgements were on
   their way, or because the daemon was killed. A resume shows how much: a client that continues at byte 900
   has the bytes before it. So a delivery that broke off leaves a *tail*, the positions that the client may
   have reached, and a delivery that starts behind byte 0 is a *resume*. A tail explains a resume if the
   resume began later and starts within the tail. The client then has the bytes between them too.
4. When the received bytes cover the package, they are a download. The progress starts anew.

A resume needs no explanation if the byte before its start is received. If several tails explain it, the one
that starts last does. A resume that starts where a tail starts is explained without any bytes: such a client
continues a segment of which it received nothing, and the tail of a neighbouring segment must not explain it.

After a kill, the last known position is the one of the last checkpoint. The client may have any byte that it
requested but the last. Only a resume through another daemon can be later than the kill. All deliveries that
one kill ended are judged together, because each of them may explain a resume.

All times are the database's, so that nodes whose clocks differ agree.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from exportd.counting.intervals import includes, join, largest, subtract
from exportd.counting.progress import MAX_PIECES, MAX_RESUMES, MAX_TAILS, NO_PROGRESS, Progress, Resume, Tail
from exportd.domain.delivery import DownloadEvent, Outcome


def add(progress: Progress, *deliveries: DownloadEvent) -> tuple[Progress, bool]:
    """Adds one delivery, or those that one kill ended. Returns the progress, and whether it is a download."""
    if any(delivery.is_whole for delivery in deliveries):
        return NO_PROGRESS, True
    # If the package changed, no byte can be trusted.
    trusted = [delivery for delivery in deliveries if delivery.outcome is not Outcome.CHANGED]
    received = join(progress.received, *(delivery.received for delivery in trusted))
    new_tails = [tail for delivery in trusted for tail in _tail_of(delivery)]
    new_resumes = [resume for delivery in trusted for resume in _resume_of(delivery)]
    tails = [*progress.tails, *new_tails]
    unexplained: list[Resume] = []
    for resume in sorted([*progress.resumes, *new_resumes], key=lambda resume: resume.start):
        if includes(received, resume.start - 1, resume.start):
            continue
        # The earlier tails do not explain the earlier resumes.
        possible = tails if resume in new_resumes else new_tails
        knowns = [tail.known for tail in possible if tail.explains(resume)]
        if knowns:
            received = join(received, [(max(knowns), resume.start)])
        else:
            unexplained.append(resume)
    size = deliveries[0].package_size_bytes
    if size and includes(received, 0, size):
        return NO_PROGRESS, True
    # A tail whose bytes are all received explains nothing.
    useful = [tail for tail in tails if not includes(received, max(tail.known - 1, 0), tail.reach)]
    newest = sorted(unexplained, key=lambda resume: resume.began_at)[-MAX_RESUMES:]
    return Progress(largest(received, MAX_PIECES), tuple(useful[-MAX_TAILS:]), tuple(newest)), False


def add_end(progress: Progress, end: DownloadEvent, lost: DownloadEvent) -> tuple[Progress, bool]:
    """Like ``add``, for a delivery that ended after all, after it was recorded as ``lost``.

    Only the bytes since then join: the client may have completed a download meanwhile.
    """
    tails = tuple(tail for tail in progress.tails if tail not in _tail_of(lost))
    since = subtract(join(end.received), join(lost.received))
    return add(replace(progress, tails=tails), replace(end, received=since))


def fold(
    progress: Progress, deliveries: Iterable[DownloadEvent], lost: Mapping[UUID, DownloadEvent]
) -> tuple[Progress, int]:
    """Adds a batch in the order of the deliveries' ends, whatever the batch's own order is.

    ``lost``: by event_id, what was recorded of deliveries that ended after all. Returns the progress, and the
    number of downloads.
    """
    groups: dict[UUID, list[DownloadEvent]] = defaultdict(list)
    for delivery in sorted(deliveries, key=_order):
        is_lost = delivery.outcome is Outcome.LOST
        groups[delivery.daemon_id if is_lost else delivery.event_id].append(delivery)
    downloads = 0
    for group in sorted(groups.values(), key=lambda group: max(map(_order, group))):
        before = lost.get(group[0].event_id)
        progress, is_download = add_end(progress, group[0], before) if before else add(progress, *group)
        downloads += is_download
    return progress, downloads


def _ended_at(delivery: DownloadEvent) -> datetime:
    # Of a lost delivery: the time of its last checkpoint.
    return delivery.started_at + timedelta(seconds=delivery.duration_seconds)


def _order(delivery: DownloadEvent) -> tuple[datetime, UUID]:
    return _ended_at(delivery), delivery.event_id


def _tail_of(delivery: DownloadEvent) -> list[Tail]:
    if len(delivery.requested) != 1:
        return []
    ((start, stop),) = delivery.requested
    known = delivery.received[-1][1] if delivery.received else start
    match delivery.outcome:
        case Outcome.ABORTED | Outcome.FAILED:
            return [Tail(known, start + delivery.bytes_sent, delivery.started_at, None)]
        case Outcome.LOST:
            return [Tail(known, stop - 1, _ended_at(delivery), delivery.daemon_id)]
    return []


def _resume_of(delivery: DownloadEvent) -> list[Resume]:
    start = min((start for start, _ in delivery.requested), default=0)
    return [Resume(start, delivery.started_at, delivery.daemon_id)] if start > 0 else []

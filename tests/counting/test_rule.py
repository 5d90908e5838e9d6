"""The rule of counting against simulated clients that know the truth.

A simulated client downloads a package until it has every byte, or abandons it. Deliveries end, break off, or
die with their daemon. The client may have more than it acknowledged. The rule sees only the records.
"""

import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest

from exportd.counting.intervals import Intervals
from exportd.counting.progress import MAX_PIECES, MAX_RESUMES, MAX_TAILS, NO_PROGRESS, Progress
from exportd.counting.rule import add, fold
from exportd.domain.delivery import DownloadEvent, Outcome

START = datetime(2026, 1, 1, tzinfo=UTC)
SIZE = 1000
# The most bytes that are on their way to a client.
BUFFER = 60
SEEDS = range(14)
HISTORIES = 500


def delivery(random: Random, **changes: object) -> DownloadEvent:
    values: dict[str, object] = {
        "event_id": uuid.UUID(int=random.getrandbits(128)),
        "job_id": uuid.UUID(int=1),
        "user_id": "ann",
        "started_at": START,
        "duration_seconds": 0.0,
        "outcome": Outcome.COMPLETED,
        "http_status": 206,
        "requested": ((0, SIZE),),
        "received": (),
        "bytes_sent": 0,
        "package_size_bytes": SIZE,
        "request_id": "",
        "bytes_acknowledged": 0,
        "reason": None,
        "method": None,
        "daemon_id": uuid.UUID(int=2),
    }
    return DownloadEvent(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class Connection:
    """A running delivery, and how many bytes the client really has of it."""

    start: int
    stop: int
    began_at: datetime
    node: int
    has: int = 0
    checkpoint: int = 0
    checkpoint_at: datetime = START


@dataclass
class World:
    """Nodes that clients download from, and the records that they write."""

    random: Random
    nodes: int
    now: datetime = START
    # The records in their order; those of one kill together.
    records: list[list[DownloadEvent]] = field(default_factory=list)

    # Where the segments of parallel clients start.
    bounds: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.daemons = [self._new_id() for _ in range(self.nodes)]

    def _new_id(self) -> uuid.UUID:
        return uuid.UUID(int=self.random.getrandbits(128))

    @property
    def is_ambiguous(self) -> bool:
        """Whether a segment starts in the tail of another one. Such a start looks like a resume."""
        events = [event for group in self.records for event in group]
        tails = [tail for event in events for tail in add(NO_PROGRESS, event)[0].tails]
        return any(tail.known < bound <= tail.reach for tail in tails for bound in self.bounds)

    def tick(self) -> datetime:
        self.now += timedelta(milliseconds=self.random.randint(1, 50))
        return self.now

    def connect(self, start: int, stop: int) -> Connection:
        node = self.random.randrange(self.nodes)
        return Connection(start, stop, self.tick(), node, checkpoint_at=self.now)

    def progress(self, connection: Connection, until: int) -> None:
        """The client gets bytes; sometimes the daemon writes a checkpoint of what is acknowledged."""
        connection.has = until - connection.start
        if self.random.random() < 0.4:
            behind = self.random.randint(0, min(BUFFER, connection.has))
            connection.checkpoint = max(connection.checkpoint, connection.has - behind)
            connection.checkpoint_at = self.tick()

    def end(self, connection: Connection, *, is_closed: bool = False) -> None:
        """The connection ends: completely if the client has every byte, else it breaks off.

        ``is_closed``: the client closes it at the end of its segment, which it has acknowledged.
        """
        length = connection.stop - connection.start
        if connection.has == length:
            outcome, acknowledged, sent = Outcome.COMPLETED, length, length
        else:
            outcome = Outcome.ABORTED
            behind = 0 if is_closed else self.random.randint(0, min(BUFFER, connection.has))
            acknowledged = max(connection.checkpoint, connection.has - behind)
            sent = min(length, connection.has + self.random.randint(0, BUFFER))
        self.records.append([self._event(connection, outcome, acknowledged, sent, self.tick())])

    def kill(self, node: int, connections: list[Connection]) -> None:
        """The node's daemon is killed, with its connections. Another daemon takes its place."""
        self.records.append(
            [
                self._event(item, Outcome.LOST, item.checkpoint, item.checkpoint, item.checkpoint_at)
                for item in connections
            ]
        )
        self.daemons[node] = self._new_id()
        self.tick()

    def _event(
        self, connection: Connection, outcome: Outcome, acknowledged: int, sent: int, ended_at: datetime
    ) -> DownloadEvent:
        start = connection.start
        return delivery(
            self.random,
            started_at=connection.began_at,
            duration_seconds=(ended_at - connection.began_at).total_seconds(),
            outcome=outcome,
            requested=((start, connection.stop),),
            received=((start, start + acknowledged),) if acknowledged else (),
            bytes_sent=sent,
            daemon_id=self.daemons[connection.node],
        )


def download(world: World, segments: int, *, abandons: bool = False, is_open: bool = False) -> bool:
    """A client downloads the package in parallel segments, resuming each until it is whole. Returns whether
    it got every byte."""
    random = world.random
    bounds = [SIZE * number // segments for number in range(segments + 1)]
    world.bounds |= set(bounds[1:-1])
    missing = [(bounds[number], bounds[number + 1]) for number in range(segments)]
    connections: dict[int, Connection] = {}
    while missing:
        number = random.randrange(len(missing))
        start, stop = missing[number]
        connection = connections.get(stop)
        if connection is None:
            # A client may resume some bytes before its position, but within its segment.
            overlap = random.randint(0, 20) if random.random() < 0.2 else 0
            first = max(start - overlap, *(bound for bound in bounds if bound <= start), 0)
            connection = world.connect(first, SIZE if is_open else stop)
            connections[stop] = connection
            start = connection.start
        event = random.random()
        if abandons and event < 0.1:
            break
        if event < 0.2:
            alive = [other for other in connections.values() if other.node == connection.node]
            world.kill(connection.node, alive)
            connections = {end: other for end, other in connections.items() if other not in alive}
        elif event < 0.35:
            world.end(connections.pop(stop))
        else:
            got = random.randint(start, stop)
            world.progress(connection, max(got, connection.start + connection.has))
            missing[number] = (max(got, start), stop)
            if got == stop:
                del missing[number]
                world.end(connections.pop(stop), is_closed=True)
    for connection in connections.values():
        world.end(connection)
    return not missing


class Record:
    """What the database holds of one principal. Writes each delivery once."""

    def __init__(self) -> None:
        self.progress: Progress = NO_PROGRESS
        self.downloads = 0
        self._known: set[uuid.UUID] = set()

    def write(self, batch: list[DownloadEvent]) -> None:
        new = [event for event in batch if event.event_id not in self._known]
        self._known |= {event.event_id for event in new}
        if new:
            self.progress, downloads = fold(self.progress, new, {})
            self.downloads += downloads
        assert len(self.progress.received) <= MAX_PIECES
        assert len(self.progress.tails) <= MAX_TAILS
        assert len(self.progress.resumes) <= MAX_RESUMES


def batches(random: Random, events: list[DownloadEvent]) -> list[list[DownloadEvent]]:
    """The events in batches of random sizes, each in random order. Some batches are written twice."""
    found = []
    while events:
        size = random.choice([1, 1, 2, 5, 50])
        batch, events = events[:size], events[size:]
        random.shuffle(batch)
        found += [batch] * random.choice([1, 1, 2])
    return found


def written(random: Random, kills: list[list[DownloadEvent]]) -> int:
    record = Record()
    for batch in batches(random, [event for group in kills for event in group]):
        record.write(batch)
    return record.downloads


@pytest.mark.parametrize("seed", SEEDS)
def test_a_finished_download_counts_once_in_any_order_of_its_records(seed: int) -> None:
    random = Random(seed)
    for _ in range(HISTORIES):
        world = World(random, nodes=random.choice([1, 2]))
        assert download(world, random.choice([1, 1, 2, 4]), is_open=random.random() < 0.5)
        if random.random() < 0.5:
            random.shuffle(world.records)
        assert written(random, world.records) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_each_of_several_finished_downloads_counts_once(seed: int) -> None:
    random = Random(seed)
    compared = 0
    for _ in range(HISTORIES):
        world, finished = World(random, nodes=random.choice([1, 2])), random.choice([2, 3])
        for _ in range(finished):
            assert download(world, random.choice([1, 1, 2]), is_open=random.random() < 0.2)
        if not world.is_ambiguous:
            compared += 1
            assert written(random, world.records) == finished
    assert compared > HISTORIES / 3


@pytest.mark.parametrize("seed", SEEDS)
def test_an_abandoned_download_does_not_count(seed: int) -> None:
    random = Random(seed)
    compared = 0
    for _ in range(HISTORIES):
        world = World(random, nodes=random.choice([1, 2]))
        is_open = random.random() < 0.5
        is_finished = download(world, random.choice([1, 1, 2, 4]), abandons=True, is_open=is_open)
        if not is_finished and not world.is_ambiguous:
            compared += 1
            assert written(random, world.records) == 0
    assert compared > HISTORIES / 4


def test_an_abandoned_download_may_count_if_a_segment_starts_in_the_tail_of_another() -> None:
    """The stated exception: the second segment starts where the first one may have arrived."""
    random = Random(0)
    first = delivery(
        random, outcome=Outcome.ABORTED, received=((0, 480),), bytes_sent=520, requested=((0, SIZE),)
    )
    later = START + timedelta(seconds=1)
    second = delivery(random, started_at=later, requested=((500, SIZE),), received=((500, SIZE),))
    assert fold(NO_PROGRESS, [first, second], {}) == (NO_PROGRESS, 1)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_records_in_a_batch_is_irrelevant(seed: int) -> None:
    random = Random(seed)
    for _ in range(20):
        world = World(random, nodes=2)
        for _ in range(3):
            download(world, random.choice([1, 2, 4]), abandons=True, is_open=True)
        batch = [event for group in world.records for event in group]
        expected = fold(NO_PROGRESS, batch, {})
        random.shuffle(batch)
        assert fold(NO_PROGRESS, batch, {}) == expected


def test_the_progress_stays_small_and_keeps_its_longest_pieces() -> None:
    random, progress = Random(0), NO_PROGRESS
    size = 10_000_000
    large = delivery(
        random, package_size_bytes=size, requested=((5_000_000, size),), received=((5_000_000, 6_000_000),)
    )
    progress, _ = add(progress, large)
    for number in range(2000):
        start = 3 + number * 1000
        broken = delivery(
            random,
            outcome=Outcome.ABORTED,
            started_at=START + timedelta(seconds=number),
            package_size_bytes=size,
            requested=((start, start + 900),),
            received=((start, start + 1),),
            bytes_sent=500,
        )
        progress, is_download = add(progress, broken)
        assert not is_download
    assert len(progress.received) == MAX_PIECES
    assert (5_000_000, 6_000_000) in progress.received
    assert len(progress.tails) == MAX_TAILS
    assert len(progress.resumes) == MAX_RESUMES
    assert progress.tails[-1].known == 3 + 1999 * 1000 + 1


def at(seconds: float, start: int, stop: int, **changes: object) -> DownloadEvent:
    """A delivery that began then; by default the client acknowledged all that it requested."""
    values: dict[str, object] = {"received": ((start, stop),), "bytes_sent": stop - start, **changes}
    return delivery(
        Random(seconds), started_at=START + timedelta(seconds=seconds), requested=((start, stop),), **values
    )


def broken(seconds: float, start: int, acknowledged: int, sent: int, **changes: object) -> DownloadEvent:
    received = ((start, acknowledged),) if acknowledged > start else ()
    values = {"outcome": Outcome.ABORTED, "received": received, "bytes_sent": sent - start, **changes}
    return at(seconds, start, SIZE, **values)


def received(*deliveries: DownloadEvent) -> Intervals:
    progress, downloads = fold(NO_PROGRESS, deliveries, {})
    assert downloads == 0
    return progress.received


OTHER = uuid.UUID(int=3)


def test_a_segment_of_which_nothing_arrived_is_not_explained_by_its_neighbour() -> None:
    nothing, neighbour = broken(1, 500, 500, 600), broken(2, 0, 400, 700)
    assert received(nothing, neighbour, at(3, 500, 900)) == ((0, 400), (500, 900))


def test_a_resume_through_the_same_daemon_was_not_after_its_kill() -> None:
    lost = broken(1, 0, 400, 400, outcome=Outcome.LOST)
    assert received(lost, at(2, 600, 900)) == ((0, 400), (600, 900))
    assert received(lost, at(2, 600, 900, daemon_id=OTHER)) == ((0, 900),)


def test_the_tail_that_starts_last_explains_a_resume() -> None:
    near, far = broken(1, 350, 500, 700), broken(2, 0, 300, 700)
    assert received(near, far, at(3, 600, 900)) == ((0, 300), (350, 900))


def test_a_resume_behind_a_received_byte_needs_no_explanation() -> None:
    assert received(at(1, 500, 600), broken(2, 0, 300, 700), at(3, 600, 900)) == ((0, 300), (500, 900))


def test_deliveries_that_one_kill_ended_are_judged_together() -> None:
    """The record of the resume comes first, and the older delivery must not explain it alone."""
    first, second = (
        broken(n, start, start + 100, 0, outcome=Outcome.LOST) for n, start in ((1, 0), (2, 500))
    )
    progress, _ = fold(NO_PROGRESS, [at(3, 800, 900, daemon_id=OTHER)], {})
    progress, _ = fold(progress, [first, second], {})
    assert progress.received == ((0, 100), (500, 900))


def test_a_changed_package_adds_nothing() -> None:
    changed = at(1, 100, 500, outcome=Outcome.CHANGED, received=())
    assert fold(NO_PROGRESS, [changed], {}) == (NO_PROGRESS, 0)


def test_a_delivery_that_ends_after_it_was_lost_adds_only_the_bytes_since() -> None:
    end = broken(1, 0, 450, 500)
    lost = replace(end, outcome=Outcome.LOST, received=((0, 400),))
    progress, _ = add(NO_PROGRESS, lost)
    resumed = add(progress, at(2, 400, SIZE, daemon_id=OTHER))
    assert resumed == (NO_PROGRESS, True)
    progress, downloads = fold(resumed[0], [end], {end.event_id: lost})
    assert (progress.received, downloads) == (((400, 450),), 0)
    # Its tail is now the one of its end.
    progress, _ = fold(add(NO_PROGRESS, lost)[0], [end], {end.event_id: lost})
    assert [(tail.known, tail.reach) for tail in progress.tails] == [(450, 500)]

"""Max-min fairness: equal shares, and the unused part of a share goes to the others."""

from collections import defaultdict
from collections.abc import Hashable, Sequence


def share(total: float, demands: Sequence[float]) -> list[float]:
    """Divides ``total``. A member that can take more never gets less than another one.

    If all demands are met, the rest is divided equally, so that the sum is always ``total``.
    """
    rates = [0.0] * len(demands)
    left = total
    for position, index in enumerate(sorted(range(len(demands)), key=demands.__getitem__)):
        rates[index] = min(demands[index], left / (len(demands) - position))
        left -= rates[index]
    return [rate + left / len(rates) for rate in rates]


def share_by_group(total: float, members: Sequence[tuple[Hashable, float]]) -> list[float]:
    """Like ``share``, among groups and then among the members of each. A member is its group and its
    demand."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, (group, _) in enumerate(members):
        groups[group].append(index)
    demands = [[members[index][1] for index in indexes] for indexes in groups.values()]
    rates = [0.0] * len(members)
    for group_rate, indexes, inner in zip(
        share(total, [sum(inner) for inner in demands]), groups.values(), demands, strict=True
    ):
        for index, rate in zip(indexes, share(group_rate, inner), strict=True):
            rates[index] = rate
    return rates

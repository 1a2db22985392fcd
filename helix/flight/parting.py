"""Where ranks part: the sentences that name a rank which came to something else than the others. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def runs_of(ranks: Iterable[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["0-2", "5"]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def ranks_in_words(ranks: Iterable[int]) -> str:
    """[3] -> "rank 3"; [0, 1, 2, 5] -> "ranks 0-2 and 5"."""
    distinct = set(ranks)
    words, plural = runs_of(distinct), len(distinct) > 1
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"rank{'s' * plural} {listed}"


def tensor_in_words(key: str, shape: Sequence[int] | None, dtype: str) -> str:
    """As "all_to_all/attention.qkv [4, 64, 96] float32"."""
    return " ".join(word for word in (key, "" if shape is None else str(list(shape)), dtype) if word)


def place_in_words(number: int, axis: str, ranks: Sequence[int]) -> str:
    """As "collective 117 of the slice axis (ranks 0-3)"."""
    return f"collective {number} of the {axis} axis ({ranks_in_words(ranks)})"


def parted(place: str, came: Mapping[int, str]) -> tuple[list[int], str]:
    """The ranks that came to one place with something else than most, and the sentence; the few before the many.

    Args:
        place: as `place_in_words` says it.
        came: each rank's tensor in words, by global rank.
    """
    counts = Counter(came.values())
    first = {what: min(rank for rank, own in came.items() if own == what) for what in counts}
    # Of two that came once each neither is the common one: the lower rank's is taken for it.
    common = max(counts, key=lambda what: (counts[what], -first[what]))
    odd = sorted(rank for rank, own in came.items() if own != common)
    groups = [[rank for rank in odd if came[rank] == what] for what in dict.fromkeys(came[rank] for rank in odd)]
    said = [f"{ranks_in_words(group)} came to {place} with {came[group[0]]}" for group in groups]
    others = ranks_in_words(rank for rank, own in came.items() if own == common)
    return odd, "; ".join([*said, f"{others} with {common}"])


def rows_parted(
    place: str, what: str, rows: Mapping[int, tuple[Sequence[int], Sequence[int]] | None]
) -> tuple[list[int], str]:
    """As `parted`, of an all-to-all in which one rank sends another than is received there.

    Args:
        rows: that each rank sends to, and receives from, each of them in their order.
    """
    ranks = list(rows)
    held = [each or ((0,) * len(ranks), (0,) * len(ranks)) for each in rows.values()]
    wrong = [
        (source, target)
        for source in range(len(ranks))
        for target in range(len(ranks))
        if held[source][0][target] != held[target][1][source]
    ]
    odd = Counter(index for pair in wrong for index in pair).most_common(1)[0][0]
    source, target = next(pair for pair in wrong if odd in pair)
    sent, due = held[source][0][target], held[target][1][source]
    if odd == source:
        own, other = f"to send {sent} rows to rank {ranks[target]}", f"which came to receive {due}"
    else:
        own, other = f"to receive {due} rows from rank {ranks[source]}", f"which came to send {sent}"
    return [ranks[odd]], f"rank {ranks[odd]} came to {place}, {what}, {own}, {other}"

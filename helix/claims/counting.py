"""Checks by a sum, a quotient or a count of what the papers state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helix.claims.outcome import Outcome
from helix.config.words import figure
from helix.partition.grid import Grid, HeadLayout


def change(before: float, after: float, stated: float, digits: int = 1) -> Outcome:
    """Whether a stated change in per cent is that of two stated figures, to as many digits as it has."""
    follows = abs(after / before - 1) * 100
    words = f"|{figure(after)} / {figure(before)} - 1| = {follows:.2f} %; stated: {stated:g} %"
    return Outcome(stated / 100, follows / 100, round(follows, digits) == round(stated, digits), words)


def change_within(changes: Sequence[Sequence[float]], low: float, high: float) -> Outcome:
    """Whether the changes of several pairs of figures, in whole per cent, span a stated range."""
    found = [abs(after / before - 1) * 100 for before, after in changes]
    words = f"{', '.join(f'{each:.1f} %' for each in found)}; stated: {low:g} to {high:g} %"
    agrees = (round(min(found)), round(max(found))) == (low, high)
    return Outcome(high / 100, max(found) / 100, agrees, words)


def listed(stated: int, names: Sequence[str]) -> Outcome:
    """Whether as many things are named as are announced."""
    words = f"{stated} announced, {len(names)} named: {', '.join(names)}"
    return Outcome(stated, len(names), stated == len(names), words)


def one_value(stated: Sequence[float | str]) -> Outcome:
    """Whether what is said to be one thing has one value wherever it is stated; `follows` counts the values."""
    values = sorted(set(stated), key=str) if any(isinstance(each, str) for each in stated) else sorted(set(stated))
    words = f"stated as {', '.join(each if isinstance(each, str) else figure(each) for each in values)}"
    return Outcome(1, len(values), len(values) == 1, words)


def enough(needed: int, available: int) -> Outcome:
    """Whether a test that needs so many devices ran on a system that has so many."""
    return Outcome(available, needed, needed <= available, f"{needed} needed, {available} in the system described")


def cores(sockets: int, cores_each: int, stated: int) -> Outcome:
    """Whether a named system has as many cores as are stated."""
    follows = sockets * cores_each
    return Outcome(stated, follows, stated == follows, f"{sockets} x {cores_each} = {follows} cores; stated: {stated}")


def width_of_heads(heads: int, head_dim: int, stated: int) -> Outcome:
    """Whether D = h x d."""
    return Outcome(stated, heads * head_dim, stated == heads * head_dim, f"{heads} x {head_dim} = {heads * head_dim}")


def most_devices(heads: int, head_dim: int, stated: int) -> Outcome:
    """The most devices that whole heads divide over, which are as many as there are heads."""
    layout = HeadLayout(heads, heads, head_dim)
    follows = max(n for n in range(1, 4 * heads) if Grid(1, n).fits(layout))
    return Outcome(stated, follows, stated == follows, f"the largest n that divides {heads} heads: {follows}")


def idle_devices(devices: int, heads: int) -> Outcome:
    """Devices that have no whole head: N - h."""
    follows = max(0, devices - heads)
    return Outcome(devices - heads, follows, follows == devices - heads, f"{devices} - {heads} = {follows}")


def more_devices_than_heads(devices: int, heads: Sequence[int]) -> Outcome:
    """How many of the papers' settings have more devices than heads, which is what slices are for."""
    follows = sum(devices > each for each in heads)
    words = f"{devices} devices with {', '.join(map(str, heads))} heads: {follows} settings of {len(heads)}"
    return Outcome(1, follows, follows > 0, words)


def communication_time(tokens_per_s: float, ms_per_token: float, devices: int, batch: int) -> Outcome:
    """Whether there is time for the stated communication, by either reading of "per token"; `follows` is the first.

    Of every token that is processed: seconds of communication in a second, of which `devices` devices have `devices`.
    Of every step that gives each sequence of the batch a token: its time against the whole step's.
    """
    follows = tokens_per_s * ms_per_token / 1e3
    step_ms = batch / tokens_per_s * 1e3
    words = (
        f"{figure(tokens_per_s)} tokens/s x {ms_per_token} ms = {follows:.0f} s of communication in each second of "
        f"{devices} devices; and a step of {batch} tokens takes {step_ms:.3f} ms at that speed"
    )
    return Outcome(devices, follows, follows <= devices or ms_per_token <= step_ms, words)


def batches_of_weak_scaling(batch: int, at: int, devices: Sequence[int]) -> Outcome:
    """How many different batches weak scaling needs, whose work for each device stays what it is at `at` devices."""
    batches = [batch * each // at for each in devices]
    words = f"{batch} on {at} devices are {', '.join(map(str, batches))} on {', '.join(map(str, devices))}"
    return Outcome(1, len(set(batches)), len(set(batches)) == 1, words)


def busy_time(shares: Sequence[float], tokens_per_s: Sequence[float], stated: float) -> Outcome:
    """Utilization of links before and after beside a stated reduction of the time in them, by two readings.

    As a part of time: how much less a token keeps the links busy, which is `follows`. As the bandwidth reached while
    communicating: how many bytes less that needs, possible if not fewer than none.
    """
    before, after = (share / speed for share, speed in zip(shares, tokens_per_s, strict=True))
    follows, fewer = 1 - after / before, 1 - (1 - stated) * shares[1] / shares[0]
    words = (
        f"{shares[0]:.0%} / {figure(tokens_per_s[0])} and {shares[1]:.0%} / {figure(tokens_per_s[1])}: "
        f"{before * 1e6:.3f} and {after * 1e6:.3f} us of a busy link a token, {follows:.1%} less; stated: "
        f"{stated:.1%}, which as bandwidth needs {fewer:.1%} fewer bytes"
    )
    return Outcome(stated, follows, abs(follows - stated) < 0.05 or fewer >= 0, words)


ALL: tuple[Callable[..., Outcome], ...] = (
    change,
    change_within,
    listed,
    one_value,
    enough,
    cores,
    width_of_heads,
    most_devices,
    idle_devices,
    more_devices_than_heads,
    communication_time,
    batches_of_weak_scaling,
    busy_time,
)

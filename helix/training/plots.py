"""What the pictures of trainings show: curves over seeds, distances to references, and where all that comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from helix.figures import settings as figure
from helix.figures import training
from helix.study.plots import days, machine
from helix.training.compare import Curve, Setting, band, loss_gaps, together

if TYPE_CHECKING:
    import pandas as pd

# Settings whose losses stay this near to the reference's, in nats, compute the same function: their distance is drawn
# on a logarithmic axis.
_SAME = 1e-2
_NOTHING = 1e-8  # where a distance of 0 is drawn


def draw_run(report: dict[str, Any]) -> Figure:
    """A run's curves.

    Args:
        report: content of train_report.json.
    """
    return training.run(report, *_provenance([report]))


def losses(settings: Sequence[Setting]) -> pd.DataFrame:
    """All curves of a sweep's picture, so that it can be drawn again without the runs; see `settings_from`.

    Returns:
        columns `setting`, `reference`, `seed`, `step`, `loss` (nats a token) and `validation_bpb`, missing at the
        steps that had none.
    """
    import pandas as pd

    rows = []
    for setting in settings:
        for seed, report in setting.reports.items():
            validated = {each["step"]: each["bpb"] for each in report["validations"]}
            reference = setting.reference.label if setting.reference else None
            rows += [
                (setting.label, reference, seed, step, loss, validated.get(step))
                for step, loss in enumerate(report["losses"], 1)
            ]
    return pd.DataFrame(rows, columns=["setting", "reference", "seed", "step", "loss", "validation_bpb"])


def settings_from(frame: pd.DataFrame) -> list[Setting]:
    """The settings of `losses`, as read from a CSV too; their reports hold nothing but the curves."""
    found: dict[str, Setting] = {}
    for label, own in frame.groupby("setting", sort=False):
        reports = {}
        for seed, run in own.groupby("seed"):
            validated = run.dropna(subset="validation_bpb")
            validations = [{"step": row.step, "bpb": row.validation_bpb} for row in validated.itertuples()]
            reports[int(str(seed))] = {"losses": run["loss"].tolist(), "validations": validations}
        found[str(label)] = Setting(str(label), reports, found.get(str(own["reference"].iloc[0])))
    return list(found.values())


def draw_settings(settings: Sequence[Setting], about: str | None = None) -> Figure:
    """Training loss and validation of each setting; and, where something is compared, its distance to the reference.

    Args:
        settings: of a sweep, some of them with reports.
        about: where they come from, where their reports do not say it.
    """
    shown = [setting for setting in settings if setting.reports]
    reports = [report for setting in shown for report in setting.reports.values()]
    words, logarithmic, distances = _distances(shown)
    drawn = [
        figure.Drawn(
            setting.label,
            place,
            group,
            _over([training.smooth(report["losses"]) for report in setting.reports.values()]),
            _over([training.validations(report) for report in setting.reports.values()]),
            distances.get(setting.label),
        )
        for setting, (group, place) in zip(shown, _places(shown), strict=True)
    ]
    seeds = sorted({seed for setting in shown for seed in setting.reports})
    over = (
        f"{len(seeds)} seeds; thick: their mean, band: its 95\u00a0% t-interval"
        if len(seeds) > 1
        else f"seed {seeds[0]}"
    )
    averaged = training.width(max(len(report["losses"]) for report in reports))
    where = _provenance(reports) if about is None else (about,)
    return figure.settings(drawn, words, logarithmic, averaged, *where, over)


def _places(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """Of each setting which reference it is held against, and its place among those that are."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        groups.setdefault((setting.reference or setting).label, []).append(setting.label)
    found = {
        label: (group, place) for group, members in enumerate(groups.values()) for place, label in enumerate(members)
    }
    return [found[setting.label] for setting in settings]


def _over(curves: Sequence[tuple[Curve, Curve]]) -> figure.Seeds:
    """One quantity over seeds, at the steps that all have."""
    at, values = min((steps for steps, _ in curves), key=len), together([found for _, found in curves])
    return figure.Seeds(at, values, *(band(values) if len(values) > 1 else ()))


def _distances(settings: Sequence[Setting]) -> tuple[str, bool, dict[str, figure.Seeds]]:
    """How far each setting is from its reference: the validation; or the loss, where that is within rounding.

    Returns:
        what that is in words, whether its axis is logarithmic, and the distances by setting.
    """
    pairs = [setting for setting in settings if setting.pairs]
    gaps = {setting.label: found for setting in pairs if (found := loss_gaps(setting)) is not None}
    if not gaps:
        return "", False, {}
    names = list(dict.fromkeys(setting.reference.label for setting in pairs if setting.reference is not None))
    name = names[0] if len(names) == 1 else "the reference"
    if max(float(np.nanmax(found)) for found in gaps.values()) < _SAME:
        words = f"Training loss: largest distance so far to that of {name}, nats a token (0 at the bottom)"
        return words, True, {label: _largest(found) for label, found in gaps.items()}
    words = f"Validation above {name}'s, bits per byte"
    return words, False, {setting.label: _over([_minus(*pair) for pair in setting.pairs]) for setting in pairs}


def _largest(gaps: Curve) -> figure.Seeds:
    """Of gaps[pair, step] the largest up to each step."""
    found = np.maximum(np.maximum.accumulate(gaps.max(0)), _NOTHING)
    return figure.Seeds(np.arange(1, len(found) + 1, dtype=np.float64), found[None])


def _minus(own: dict[str, Any], other: dict[str, Any]) -> tuple[Curve, Curve]:
    """The difference of the validations that both made."""
    values, others = (dict(zip(*training.validations(report), strict=True)) for report in (own, other))
    both = [step for step in values if step in others]
    return np.array(both), np.array([values[step] - others[step] for step in both])


def _provenance(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    models = {each["model"]["name"]: each["parameters"] / 1e6 for each in reports}
    yield "model " + ", ".join(f"{name} ({millions:.2g} M parameters)" for name, millions in models.items())
    sizes = dict.fromkeys(
        f"{each['data']['batch_size'] * each['trainer']['accumulate_grad_batches']} x {each['data']['seq_len']}"
        for each in reports
    )
    yield f"steps of {', '.join(sizes)} tokens of {', '.join(dict.fromkeys(each['text'] for each in reports))}"
    yield ", ".join(dict.fromkeys(each["precision"] for each in reports))
    yield machine(each["world_size"] for each in reports)
    yield days(each["started_at"] for each in reports)
    yield ", ".join(dict.fromkeys(f"commit {each['git_commit'][:7]}" for each in reports if each["git_commit"]))

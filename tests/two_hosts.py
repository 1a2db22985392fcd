"""Slices inside hosts against slices across them: step times over a link of a given rate, and what it carried.

    python tests/two_hosts.py --rate 1gbit --rounds 6 --to paper/results/2026-11-22_two_hosts.json \\
        parallel=helix_4x4 model=tiny workload=small

Two hosts made of namespaces on this machine, half of the ranks on each, all in one start of torchrun; placements take
turns, in both orders. The cores are the machine's own, shared by all ranks of both hosts: where these are few, cores
and not the link bound both placements, and the ratio is nearer to 1 than on real hosts.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from hosts import why_not
from torchruns import jobs, read

from helix.study.provenance import command, git_commit, machine, now, versions
from helix.study.report import write_whole
from helix.study.statistics import ratio_interval, summarize

INSIDE, ACROSS = "slices_inside", "slices_across"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def measured(rate: str, ranks: int, rounds: int, words: list[str]) -> dict[str, Any]:
    """Both placements in `rounds` turns: step times, their ratio, bytes of the link."""
    order = [each for turn in range(rounds) for each in ((INSIDE, ACROSS) if turn % 2 == 0 else (ACROSS, INSIDE))]
    lines = [[*words, "logger=none", f"parallel.placement={placement}"] for placement in order]
    with tempfile.TemporaryDirectory() as folder:
        carried = jobs(Path(folder) / "jobs", ranks // 2, lines, rate, timeout=60 + 60 * len(lines))
        reports = [read(Path(folder) / "jobs" / str(number)) for number in range(len(lines))]
    assert len({report["accuracy"]["output_sha256"] for report in reports}) == 1
    step_ms = {one: [r["step_ms"]["mean"] for r, at in zip(reports, order, strict=True) if at == one] for one in order}
    ratio = ratio_interval(step_ms[ACROSS], step_ms[INSIDE])
    found = {one: of(one, order, reports, carried, rate) for one in (INSIDE, ACROSS)}
    inside, across = found[INSIDE], found[ACROSS]
    return {
        "rate": rate,
        "ranks": ranks,
        "across_over_inside": {"ratio": ratio.ratio, "ci95": ratio.ci95, "pairs": ratio.pairs},
        # What the link alone would add is the prediction, where cores have as much to do in both.
        "across_less_inside_ms": {
            "measured": across["step_ms"]["mean"] - inside["step_ms"]["mean"],
            "predicted": across["link_alone_ms"] - inside["link_alone_ms"],
        },
        "placements": found,
    }


def of(one: str, order: list[str], reports: list[Any], carried: list[Any], rate: str) -> dict[str, Any]:
    """What was found of one placement."""
    mine = [number for number, each in enumerate(order) if each == one]
    between = reports[mine[0]]["between_hosts"]
    a_host = max(sum(to.values()) for to in between["pairs"].values())
    return {
        "step_ms": vars(summarize([reports[number]["step_ms"]["mean"] for number in mine])),
        "bytes_a_step": {
            "executed": between["executed"],
            "predicted": between["predicted"],
            "pairs": between["pairs"],
        },
        "link_alone_ms": 8e3 * a_host / bits_per_s(rate),
        "sent_in_a_job": [carried[number] for number in mine],
    }


def bits_per_s(rate: str) -> float:
    """A rate of tc's, such as 1gbit."""
    figure, unit = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)", rate, re.IGNORECASE).groups()  # type: ignore[union-attr]
    return float(figure) * UNITS[unit.lower()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", default="1gbit", help="of each host's link, each way")
    parser.add_argument("--ranks", type=int, default=16, help="of both hosts together, as many as the grid has")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--to", type=Path, required=True, help="a JSON file")
    parser.add_argument("words", nargs="+", help="infer.py's")
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    began = now()
    content = measured(options.rate, options.ranks, options.rounds, options.words)
    about = {"started_at": began, "command": command(), "git_commit": git_commit(), "machine": machine()}
    write_whole(
        json.dumps({**content, "words": options.words, **about, "versions": versions()}, indent=2) + "\n", options.to
    )
    for name, each in content["placements"].items():
        step, link = each["step_ms"], each["link_alone_ms"]
        sizes = each["bytes_a_step"]
        print(f"{name:14} step {step['mean']:8.1f} ms, the link alone {link:8.1f} ms, bytes {sizes['pairs']}")
    ratio = content["across_over_inside"]
    low, high = ratio["ci95"]
    print(f"across / inside {ratio['ratio']:.2f} ({low:.2f} .. {high:.2f}, {ratio['pairs']} pairs)")
    more = content["across_less_inside_ms"]
    print(f"across - inside {more['measured']:.1f} ms, by the link alone {more['predicted']:.1f} ms")


if __name__ == "__main__":
    main()

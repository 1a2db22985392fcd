"""`python -m helix calibrate`: what it writes, what it makes of times, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import ROOT, Command
from rich.console import Console

from helix.calibration import compute, file, table
from helix.calibration.exchanges import groups, sent_bytes
from helix.calibration.points import Points, points_of
from helix.calibration.results import Calibration, computing, exchanging, operations_of_a_layer
from helix.command.plan import settings
from helix.config.check import check_values
from helix.config.hardware import (
    KINDS,
    LIBRARY_KINDS,
    HardwareConfig,
    MeasuredAttention,
    MeasuredExchange,
    MeasuredProducts,
)
from helix.config.schema import ConfigError
from helix.planner import catalogue
from helix.planner.machine import machine_of
from helix.study.statistics import typical

CONF = ROOT / "conf"
PEAK, STREAM, SCORES, KERNEL_US = 0.08, 5.0, 2.0, 6.0  # TFLOP/s, GB/s, GB/s
DISPATCH_US = 7000.0
LATENCY_US, LINK = 300.0, 0.5  # GB/s


def share(width: int) -> float:
    """Of the peak: what made-up products of this width reach."""
    return min(1.0, width / 128)


def made_up(points: Points, drift: list[float]) -> dict[compute.Label, list[float]]:
    """Times of a machine with exactly the figures above, each pass slower by its drift."""
    layer = points.layer
    seconds: dict[compute.Label, float] = {
        ("product", width): compute.product_flops(layer, width) / (PEAK * share(width) * 1e12)
        for width in points.widths
    }
    seconds |= {
        ("precision", name): 1e-3 * factor for name, factor in (("float32", 1), ("float64", 2), ("bfloat16", 4))
    }
    for head_dim in points.head_dims:
        for length in points.lengths:
            samples, heads = compute.attention_count(points, head_dim, length)
            flops = compute.attention_flops(samples, heads, length, head_dim)
            seconds["attention", head_dim, length] = flops / (PEAK * 0.25e12)
    for name, nbytes in compute.stream_bytes(layer, 4).items():
        seconds["stream", name] = nbytes / (STREAM * 1e9)
    samples, heads, length = compute.scores_dims(points)
    pairs, whole, narrow = samples * heads * length**2, layer.head_dim, compute.narrow_dim(points)
    for name, dims, width in (("score", 2 * whole, whole), ("gather", whole + narrow, narrow)):
        arithmetic = 2 * pairs * dims / (PEAK * share(width) * 1e12)
        seconds["scores", name] = arithmetic + 6 * 4 * pairs / (SCORES * 1e9)
    for layers in (compute.FEW_LAYERS, compute.MANY_LAYERS):
        seconds["layers", layers] = (7 + layers * operations_of_a_layer() * KERNEL_US) * 1e-6
        seconds["plain layers", layers] = (9 + layers * 80) * 1e-6
        seconds["tensor layers", layers] = (900 + layers * (80 + DISPATCH_US)) * 1e-6
    return {label: [each * factor for factor in drift] for label, each in seconds.items()}


def whole(widths: tuple[int, ...] = (8, 16, 32, 64, 128, 256)) -> Points:
    return dataclasses.replace(points_of("cpu", 4, quick=True), widths=widths)


def calibrated(drift: list[float]) -> Calibration:
    """A made-up machine's, with collectives that are a line over their bytes."""
    points = whole()
    times = {
        ranks: {
            (kind, group, size): [(LATENCY_US * 1e-6 + size / (LINK * 1e9)) * factor for factor in drift]
            for kind in KINDS
            for group in groups(ranks)
            for size in points.sizes
        }
        for ranks in points.ranks
    }
    buffers = {ranks: [14_000_000] * ranks for ranks in points.ranks}
    return exchanging(computing(points, made_up(points, drift)), times, buffers)


def named(found: Calibration, name: str = "made_up") -> Calibration:
    return dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, name=name, source="a test"))


def test_figures_of_a_known_machine_are_found() -> None:
    found = calibrated([1.0] * 6).hardware
    assert (found.devices_per_host, found.hosts, found.ranks_take_turns) == (whole().devices, 1, True)
    expected = {
        "matmul_fp32_TFLOP_per_s": PEAK,
        "matmul_fp64_TFLOP_per_s": PEAK / 2,
        "matmul_bf16_TFLOP_per_s": PEAK / 4,
        "attention_share": 0.25,
        "memory_GB_per_s": STREAM,
        "scores_GB_per_s": SCORES,
        "kernel_us": KERNEL_US,
        "dtensor_us": DISPATCH_US,
        "link_GB_per_s": LINK,
        "link_latency_us": LATENCY_US,
        "rank_MB": 14.0,
    }
    assert {key: getattr(found, key) for key in expected} == pytest.approx(expected, rel=1e-3)
    assert found.products.share == pytest.approx([share(width) for width in found.products.width], rel=1e-3)
    assert all(part == pytest.approx(0.25, rel=1e-3) for row in found.attention for part in row.share)
    machine = machine_of(found, "32-true", 4)
    for row in found.exchanges:
        for nbytes, us in zip(row.bytes, row.us, strict=True):
            if row.ranks == 4:
                assert machine.collective(row.kind, nbytes, row.group) * 1e6 == pytest.approx(us, rel=1e-6)


def test_a_pass_that_all_of_the_machine_was_slow_in_leaves_shares_as_they_are() -> None:
    drift = [1.0, 1.1, 3.0, 0.9, 1.2, 1.0]
    found = calibrated(drift)
    assert found.hardware.products.low == pytest.approx(found.hardware.products.high)
    rates = found.intervals["matmul_fp32_TFLOP_per_s"]
    assert (rates.low, rates.high) == pytest.approx((PEAK / 3.0, PEAK / 0.9))


def test_a_median_holds_what_it_says() -> None:
    """An exponential's median, in 95 % of 800 samples of 9; of 5 values no interval does."""
    random, truth = np.random.default_rng(0), math.log(2)
    found = [typical(random.exponential(size=9).tolist()) for _ in range(800)]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.95 < held < 0.98  # 96.1 % is what order statistics of 9 promise
    assert typical([3.0, 1.0, 2.0, 5.0, 4.0, 90.0]).value == 3.5
    with pytest.raises(ValueError, match="at least 6 values, not 5"):
        typical([1.0] * 5)


@pytest.mark.parametrize("group", [2, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_the_counters_count(kind: str, group: int) -> None:
    """As tests/test_collectives.py has them counted: a rank keeps one share of `group`."""
    numel = 15 * group
    parts = {"all_gather": group - 1, "all_reduce": 2 * (group - 1) / group}.get(kind, (group - 1) / group)
    assert sent_bytes(kind, group, numel) == 4 * numel * parts


def test_a_file_says_what_was_found(tmp_path: Path) -> None:
    found = named(calibrated([1.0, 1.2, 0.9, 1.1, 1.3, 1.0]))
    file.write(found, tmp_path / "made_up.yaml", "a command")
    text = (tmp_path / "made_up.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["made_up.yaml"]
    assert file.read(text) == found.hardware
    for key, low, high in re.findall(r"^(\w+): .*# n = \d+, 95 % (\S+) \.\. (\S+):", text, re.MULTILINE):
        assert float(low) <= getattr(found.hardware, key) <= float(high)
    assert max(map(len, text.splitlines())) < 170


def test_what_cannot_be_chosen_is_not_written(tmp_path: Path) -> None:
    found = named(calibrated([1.0] * 6))
    broken = dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, kernel_us=-1.0))
    with pytest.raises(ConfigError, match=r"hardware\.kernel_us must be at least 0"):
        file.write(broken, tmp_path / "made_up.yaml", "a command")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(table.render(named(calibrated([1.0, 1.2, 0.9, 1.1, 1.3, 1.0]))))
    text = " ".join(shown.get().split())
    assert "…" not in text
    assert all(key in text for key in ("kernel_us 6", "64 25% 25%", "all_to_all 2", "medians of 6 passes"))


@pytest.mark.parametrize(
    ("hardware", "says"),
    [
        (HardwareConfig(products=MeasuredProducts([8, 8], [1, 1], [1, 1], [1, 1])), "products.width must ascend"),
        (HardwareConfig(products=MeasuredProducts([8], [1], [1], [])), "products.high must have a figure for each"),
        (HardwareConfig(products=MeasuredProducts([8], [0], [1], [1])), "products.share must be above 0"),
        (HardwareConfig(attention=[MeasuredAttention(0)]), "attention[0].head_dim must be at least 1"),
        (HardwareConfig(attention=[MeasuredAttention(8)]), "attention[0].length has no points"),
        (HardwareConfig(exchanges=[MeasuredExchange("all_gather", 2, 2, [4], [1, 2])]), "exchanges[0].us must have"),
        (HardwareConfig(exchanges=[MeasuredExchange("gather", 2, 2)]), "did you mean all_gather?"),
    ],
)
def test_malformed_curves_are_refused(hardware: HardwareConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_values(hardware, "hardware.")


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of conf/ in which a machine is called this_machine, by a quick calibration."""
    folder = tmp_path_factory.mktemp("calibrate") / "conf"
    shutil.copytree(CONF, folder)
    before = {path.name for path in (folder / "hardware").iterdir()}
    process = calibrate(folder / "hardware", "--quick", "--ranks", "2")
    out, err = process.communicate(100)
    assert process.returncode == 0, err
    assert "matrix products" in out
    assert {path.name for path in (folder / "hardware").iterdir()} == before | {"this_machine.yaml"}
    return folder


def calibrate(folder: Path, *options: str, name: str = "this_machine") -> Command:
    named = ("calibrate", "--name", name, "--device", "cpu", "--folder", str(folder))
    return Command("-m", "helix", *named, *options)


def test_this_machine_can_be_planned_for(conf: Path) -> None:
    hardware = settings(["hardware=this_machine"], conf).hardware
    assert hardware == file.read((conf / "hardware/this_machine.yaml").read_text())
    rows = [(one.low, one.share, one.high) for one in (hardware.products, *hardware.attention)]
    rows += [(one.low, one.us, one.high) for one in hardware.exchanges]
    for lows, values, highs in rows:
        assert all(0 < low <= one <= high for low, one, high in zip(lows, values, highs, strict=True))
    assert {(one.kind, one.ranks, one.group) for one in hardware.exchanges} == {
        (kind, 2, 2) for kind in (*KINDS, *LIBRARY_KINDS)
    }
    assert max(hardware.products.share) == 1
    machine = machine_of(hardware, "32-true", 4)
    assert hardware.turns.ranks == [2]
    assert machine.turns == pytest.approx(4 / hardware.devices_per_host * hardware.turns.times[0])
    assert 0 < machine.matmul(1e9, 0, 64) < 10


def test_only_a_calibration_is_overwritten_and_only_by_force(conf: Path) -> None:
    path = conf / "hardware/this_machine.yaml"
    assert file.check_place(path.parent, "this_machine", force=True) == path
    with pytest.raises(ConfigError, match="is there already; take another name, or --force"):
        file.check_place(path.parent, "this_machine", force=False)
    for name in ("h200", "auto"):
        with pytest.raises(ConfigError, match=f"{name}.yaml is no calibration"):
            file.check_place(path.parent, name, force=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", "h200"], "is no calibration"),
        (["--name", "my machine"], "letters, digits and _"),
        (["--name", "mine", "--folder", "no/such"], "there is no folder no/such"),
        (["--name", "mine", "--ranks", "0"], "--ranks must be 1 to"),
        (["--name", "mine", "--ranks", "100000"], "--ranks must be 1 to"),
        (["--name", "mine", "--ranks", "two"], "invalid int value"),
        (["--name", "mine", "--device", "tpu"], "invalid choice: 'tpu'"),
        ([], "--name"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], says: str) -> None:
    process = Command("-m", "helix", "calibrate", *options)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_without_gpus_and_under_a_launcher_it_is_refused() -> None:
    process = Command("-m", "helix", "calibrate", "--name", "x", "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    _, err = process.communicate()
    assert process.returncode == 2
    assert "--device cuda needs a GPU, and this machine has none" in err
    process = Command("-m", "helix", "calibrate", "--name", "x", env={"RANK": "0", "WORLD_SIZE": "2"})
    _, err = process.communicate()
    assert process.returncode == 2
    assert "start it without torchrun" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_calibration_that_is_stopped_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = calibrate(tmp_path)
    deadline = time.monotonic() + 60
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 and time.monotonic() < deadline:  # before, a library's import may have a child
        time.sleep(0.1)
        ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.send_signal(number)
    assert process.wait(20) != 0
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert list(tmp_path.iterdir()) == []


def test_catalogues_files_hold_their_own_bounds() -> None:
    for path in sorted((CONF / "hardware").glob("*.yaml")):
        assert catalogue.hardware(path.stem).name == path.stem

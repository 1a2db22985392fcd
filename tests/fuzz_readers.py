"""Readers of outside files under damage: python tests/fuzz_readers.py manifest --seconds 60

Each target writes bytes where a file of a user's is looked for, and reads it: it gives a value or the reader's own
error. `tests/test_fuzz_readers.py` mutates valid files; here atheris does (the extra `fuzz`),
guided by lines that it has not reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuzz_files import CLAIMS, CONFIG, JOB, MANIFEST, REPORT, WEIGHTS, gguf_file, safetensors

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    """A reader.

    Args:
        read: of bytes, in an empty folder.
        seeds: files as they should be.
        errors: names of the classes of what it may raise, besides nothing.
    """

    read: Callable[[bytes, Path], object]
    seeds: tuple[bytes, ...]
    errors: tuple[str, ...] = ()


def _put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _manifest(content: bytes, folder: Path) -> object:
    from helix.checkpoint import manifest

    return manifest.read(_put(folder / manifest.FILE, content).parent)


def _sealed(content: bytes, folder: Path) -> object:
    """A stranger's manifest, whose checksum is right."""
    from helix.checkpoint.manifest import _sealed as seal

    return _manifest(seal(content.decode(errors="replace")).encode(), folder)


def _ledger(content: bytes, folder: Path) -> object:
    from rich.console import Console

    from helix.claims import ledger, resolve, table
    from helix.claims.faults import faults
    from helix.config.schema import ConfigError

    _put(folder / "run.json", b'{"a": [1, {"b": 2}], "low": 0, "high": 1}')
    found = ledger.read(_put(folder / "paper" / "claims.yaml", content))
    for claim in found.claims:
        try:
            resolve.found(found, claim)
        except ConfigError:
            continue
    faults(found)
    with (folder / "shown").open("w") as shown:
        Console(file=shown).print(table.render(found, None, None))
    return found


def _hardware(content: bytes, folder: Path) -> object:
    from helix.planner import catalogue

    return catalogue.read(_put(folder / "mine.yaml", content))


def _calibration(content: bytes, folder: Path) -> object:
    from helix.calibration import file

    return file.read(content.decode(errors="replace"))


def _config(content: bytes, folder: Path) -> object:
    from helix.config.folder import shape_of

    return shape_of(_put(folder / "config.json", content).parent)


def _index(content: bytes, folder: Path) -> object:
    from helix.pretrained import folder as model

    _put(folder / "config.json", b"{}")
    _put(folder / "a.safetensors", safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8))
    return model.find(_put(folder / model.INDEX, content).parent)


def _weights(content: bytes, folder: Path) -> object:
    from helix.pretrained import folder as model

    _put(folder / "config.json", b"{}")
    return model.find(_put(folder / model.WEIGHTS, content).parent)


def _imported(content: bytes, folder: Path) -> object:
    from helix.checkpoint.portable import import_

    return import_(_put(folder / "x.safetensors", content), folder / "made")


def _template(content: bytes, folder: Path) -> object:
    from helix.generation.asked import _has_template

    return _has_template(_put(folder / "tokenizer_config.json", content).parent)


def _outcome(content: bytes, folder: Path) -> object:
    from helix.command import sweep
    from helix.config.schema import digest

    job = sweep.SweepJob(0, (), _settings(), folder)
    text = content.replace(b"DIGEST", digest(job.settings).encode())
    for name in (sweep.REPORT, sweep.SKIPPED, sweep.FAILED):
        _put(folder / name, text)
    return sweep.outcome(job), sweep.objective(folder, job.settings), sweep.duration_s(folder, job.settings)


def _job(content: bytes, folder: Path) -> object:
    """A job's own configs, by which a sweep that another sweeper chose is told."""
    from helix.command.compose import found_jobs
    from helix.config.schema import InferConfig

    config, hydra, overrides = [*content.split(b"\n---\n"), b"", b""][:3]
    for name, part in (("config", config), ("hydra", hydra), ("overrides", overrides)):
        _put(folder / f"0/.hydra/{name}.yaml", part)
    _put(folder / "1/.hydra/config.yaml", JOB[0])
    _put(folder / "1/.hydra/hydra.yaml", JOB[1])
    _put(folder / "1/.hydra/overrides.yaml", JOB[2])
    return found_jobs(folder, InferConfig)


def _report(content: bytes, folder: Path) -> object:
    from helix.study import runs
    from helix.study.wandb_records import RunRecords

    file = _put(folder / "wandb/offline-run-1-abc/run-abc.wandb", b"")
    _put(folder / "report.json", content)
    faults: list[str] = []
    records = RunRecords("abc")
    at_home = runs._reports_of([file], [records], faults)
    return runs._table([runs._run(str(file.parent), records, faults, at_home.get(file, runs._Report()))]), faults


def _figure(content: bytes, folder: Path) -> object:
    """A run's file, and a path in it."""
    from helix.claims import resolve

    path, _, text = content.partition(b"\n")
    name = "run.csv" if path.startswith(b"[") else "run.json"
    resolve.load.cache_clear()
    where = path.decode(errors="replace")
    return resolve._number(resolve.look_up(resolve.load(_put(folder / name, text)), where), where)


def _gguf(content: bytes, folder: Path) -> object:
    """Header and fields, as Helix's own check reads them; the weights are transformers' to read."""
    import gguf as library

    from helix.pretrained import gguf

    file = _put(folder / "x.gguf", content)
    gguf.check(file, folder / "made")
    return gguf._told(file, lambda: library.GGUFReader(file))


def _wandb(content: bytes, folder: Path) -> object:
    """A run's own file, which a program of W&B's reads."""
    import warnings

    from helix.study.runs import DamagedRun, load_runs

    _put(folder / "wandb/offline-run-1-abc/run-abc.wandb", content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedRun)
        return load_runs(folder)


def _text(content: bytes, folder: Path) -> object:
    from helix.study.text import corpus

    _put(folder / "book.txt", content)
    return corpus(str(folder), 1000)


@cache
def _settings() -> object:
    from helix.config.schema import InferConfig, LoggerConfig, ModelConfig, ParallelConfig, WorkloadConfig

    layers = {"layers": 1, "width": 48, "heads": 2, "head_dim": 24, "mlp_hidden": 64, "vocab": 256}
    work = WorkloadConfig("w", 1, 1, 0, 1, 2)
    return InferConfig(ParallelConfig(m=1, n=1), ModelConfig("x", **layers), None, work, LoggerConfig())  # type: ignore


@cache
def targets() -> dict[str, Target]:
    """Every reader, by name."""
    from helix.checkpoint.manifest import seal

    own, refused = ("ConfigError", "PartitionError"), ("CheckpointError",)
    body = json.dumps(MANIFEST, separators=(",", ":"))[1:].encode()
    hardware = (ROOT / "conf/hardware/h200.yaml").read_bytes()
    curves = b"name: x\nsource: y\nturns: {ranks: [1, 2], times: [1.0, 2.0], low: [1, 1], high: [2, 3]}\n"
    curves += b"exchanges: [{kind: all_reduce, ranks: 2, group: 2, bytes: [1], us: [2], low: [1], high: [3]}]\n"
    return {
        "manifest": Target(_manifest, (seal(MANIFEST).encode(), b'{"sha256":"0",' + body), refused),
        "sealed": Target(_sealed, (body,), refused),
        "claims": Target(_ledger, (CLAIMS, b"{}", b"claims: &a [*a]"), ("LedgerError", *own)),
        "hardware": Target(_hardware, (hardware, curves), own),
        "calibration": Target(_calibration, (hardware, curves), own),
        "config": Target(_config, (CONFIG, b'{"model_type": "gpt2"}'), own),
        "index": Target(_index, (b'{"weight_map": {"x": "a.safetensors"}}',), refused),
        "weights": Target(_weights, (WEIGHTS,), refused),
        "import": Target(_imported, (WEIGHTS,), refused),
        "template": Target(_template, (b'{"chat_template": "x"}',)),
        "outcome": Target(_outcome, (REPORT, b"[]")),
        "job": Target(_job, (b"\n---\n".join(JOB), b"a: [")),
        "report": Target(_report, (REPORT, b'{"wandb": null}')),
        "figure": Target(_figure, (b'a[1].b\n{"a": [1, {"b": 2}]}', b"[0].x\nx,y\n1,2\n", b"a.*\n{}"), own),
        "gguf": Target(_gguf, (gguf_file(), b"GGUF"), refused),
        "wandb": Target(_wandb, (b":W&B\xf2\x00" + bytes(30),), ("FileNotFoundError",)),
        "text": Target(_text, (b"words",), ("ValueError",)),
    }


def check(target: Target, content: bytes) -> bool:
    """Read one content; whether it gave a value.

    Raises:
        Exception: anything that the reader must not raise.
    """
    with tempfile.TemporaryDirectory(
        prefix="helix-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as at:
        try:
            target.read(content, Path(at))
        except Exception as error:
            if type(error).__name__ not in target.errors:
                raise
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(targets()))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "helix-fuzz-found")
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["helix", "yaml", "omegaconf", "gguf"]):
        target = targets()[options.target]
        for seed in target.seeds:  # imports what it needs
            check(target, seed)
    options.keep.mkdir(exist_ok=True)

    def one(content: bytes) -> None:
        start = time.monotonic()
        try:
            check(target, content)
        except BaseException:
            (options.keep / f"{options.target}.crash").write_bytes(content)
            raise
        if time.monotonic() - start > 5:
            (options.keep / f"{options.target}.slow").write_bytes(content)
            raise TimeoutError("more than 5 s")

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        flags = [f"-max_total_time={options.seconds}", "-rss_limit_mb=4000", "-timeout=20", "-max_len=4096"]
        flags += [f"-artifact_prefix={options.keep}/{options.target}-", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Wrong input: one sentence with the legal choices, exit code 2, soon, nothing launched, nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from helix.config import environment

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_NNODES",
)
ACCOUNT = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")
GB = 10**9


@dataclass(frozen=True)
class Case:
    """A wrong command line, and what the sentence about it must hold: what is wrong and a legal choice."""

    name: str
    arguments: str
    expected: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def case(name: str, arguments: str, *expected: str, **kwargs: dict[str, str]) -> Case:
    return Case(name, arguments, expected, **kwargs)


FREE = "parallel=helix parallel.m={} parallel.n={}"
CASES = [
    # Grids
    case("n-over-heads", FREE.format(1, 32), "n=32 does not divide heads=16", "(2, 16)"),
    case("n-not-divisor", FREE.format(1, 3), "n=3 does not divide heads=16", "legal n: [1, 2, 4, 8, 16]"),
    case(
        "m-not-divisor", FREE.format(3, 1) + " model.rope=false", "m=3 does not divide head_dim=32", "legal m: [1, 2"
    ),
    case("no-grid-of-15", FREE.format(3, 5), "helix_3x5", "m*n=15", "legal m: [1, 2, 4, 8, 16]"),
    case("odd-rope-slices", FREE.format(32, 1), "m=32 does not divide head_dim/2=16", "feature pairs", "(16, 2)"),
    case("odd-head-dim", "model.head_dim=33", "head_dim must be even, not 33"),
    case("n-over-kv-heads", "parallel=helix_1x16 model.kv_heads=4", "n=16 does not divide kv_heads=4", "(4, 4)"),
    case("kv-not-divisor", "model.kv_heads=3", "kv_heads=3 does not divide heads=16", "[1, 2, 4, 8, 16]"),
    case("m-zero", "parallel.m=0", "parallel.m must be at least 1, not 0"),
    case("n-negative", "parallel.n=-4", "parallel.n must be at least 1, not -4"),
    case("m-not-given", "parallel=helix", "parallel.m is not given", "a whole number"),
    case("single-many", "parallel=single parallel.m=4", "parallel.m must be 1, not 4", "parallel=helix"),
    case("single-data", "parallel=single parallel.data=2", "parallel.data must be 1, not 2", "parallel=helix"),
    case("stage", "parallel.stage=2", "parallel.stage must be 1, not 2"),
    case("data-not-divisor", "parallel.data=3", "does not divide workload.batch_size=16", "[1, 2, 4, 8, 16]"),
    # Methods
    case("tp-heads", "parallel=tp16 model.heads=4", "over 16 ranks needs whole heads", "heads is 4", "[1, 2, 4]"),
    case("tp-m", "parallel=tp16 parallel.m=2", "parallel.m must be 1, not 2", "parallel=helix"),
    case("tp-sp-length", "parallel=tp16 parallel.residual=sharded workload.seq_len=100", "a length that they divide"),
    case("pp-layers", "parallel=tp8_pp2 model.layers=1", "2 pipeline stages need as many layers, not 1"),
    case("pp-microbatches", "parallel=tp8_pp2 parallel.microbatches=5", "microbatches=5 does not divide", "[1, 2, 4"),
    case("dp-n", "parallel=dp16 parallel.n=2", "parallel.n must be 1, not 2", "parallel=helix"),
    case("method", "parallel.method=ring", "parallel.method cannot be 'ring'", "helix, single, data, tensor"),
    case("baseline", "baseline=[tp]", "there is no method 'tp'", "tp8_pp2"),
    case("baseline-zero", "baseline=[tp0]", "there is no method 'tp0'", "any sizes"),
    case("baseline-ranks", "baseline=[tp8]", "baseline=tp8 has 8 ranks", "the 16 of helix_4x4"),
    case("baseline-twice", "baseline=[tp16,tp16]", "baseline=tp16 is there already", "once"),
    case("baseline-main", "baseline=[helix_4x4]", "baseline=helix_4x4 is there already"),
    case("baseline-no-list", "baseline=tp16", "baseline"),
    case("too-many-ranks", FREE.format(16, 16), "256 ranks", "this machine takes", "HELIX_MAX_RANKS"),
    # Schedules and ends
    case("schedule-unknown", "parallel.schedule=ulysses", "parallel.schedule cannot be 'ulysses'", "auto, perslice"),
    case("schedule-misspelt", "parallel.schedule=row", "did you mean rows?", "auto, perslice, batch, heads"),
    case("heads-too-few", "parallel.schedule=heads model.heads=4", "group's heads=1", "legal: auto, perslice, batch"),
    case("heads-gqa", "parallel.schedule=heads model.kv_heads=4", "group's kv_heads=1", "legal: auto"),
    case("batch-of-1", "parallel.schedule=batch workload.batch_size=1", "the batch has 1", "heads, rows"),
    case(
        "batch-per-replica",
        "parallel.schedule=batch parallel.data=4 workload.batch_size=8",
        "the batch has 2",
        "legal: auto",
    ),
    case("rows-too-short", "parallel.schedule=rows workload.seq_len=3", "the sequence has 3", "legal: auto"),
    case("concat-width", "parallel.aggregate=concat model.width=256", "aggregate=concat needs", "= width"),
    case("block-width", "parallel.projection=block model.heads=32", "projection=block needs", "= width"),
    case("aggregate", "parallel.aggregate=sum", "parallel.aggregate cannot be 'sum'", "project, concat"),
    case("residual", "parallel.residual=shard", "did you mean sharded?", "sharded, replicated"),
    # Models
    case("experts-ep16", "model.ep_size=16", "8 experts", "ep_size=16", "[1, 2, 4, 8]"),
    case("top-k", "model.top_k=3", "top_k must be 1 or 2", "not 3"),
    case("top-k-over-experts", "model.experts=1 model.top_k=2", "top_k=2 needs at least that many experts"),
    case("dense-experts", "model=dense model.experts=8", "model.experts=8 cannot be", "model=moe"),
    case("dense-ep-size", "model=dense model.ep_size=8", "model.ep_size=8 cannot be", "model=moe"),
    case("moe-no-experts", "model.experts=0", "model.kind=moe needs model.experts of at least 1", "model=dense"),
    case("layers-zero", "model.layers=0", "model.layers must be at least 1, not 0"),
    case("vocab-below-bytes", "model.vocab=100", "model.vocab must be at least 256, not 100"),
    case("too-large", "model=paper_dense_4l", "model=paper_dense_4l", "and 16.0 GB are available", "model=dense"),
    case("too-long", "workload=paper", "workload=paper", "GB are available", "workload.seq_len"),
    # Workloads
    case("batch-zero", "workload.batch_size=0", "workload.batch_size must be at least 1, not 0"),
    case("length-negative", "workload.seq_len=-1", "workload.seq_len must be at least 1, not -1"),
    case("warmup-negative", "workload.warmup=-1", "workload.warmup must be at least 0, not -1"),
    case("iterations-zero", "workload.iterations=0", "workload.iterations must be at least 1, not 0"),
    case("one-run", "workload.runs=1", "workload.runs must be at least 2, not 1"),
    case("text-missing", "workload.text=no.txt", "workload.text=no.txt does not exist", "or null"),
    case("text-empty", "workload.text=a.txt", "has 0 bytes, too few", "or null", files={"a.txt": ""}),
    case("text-short", "workload.text=a.txt", "has 9 bytes", "seq_len=64", files={"a.txt": "too short"}),
    case("text-unreadable", "workload.text=secret", "cannot be read", "or null", files={"secret": "x" * 999}),
    # Machine and launcher
    case("cuda-no-gpu", "device=cuda", "device=cuda needs a GPU for each of 16 ranks", "device=cpu"),
    case("device", "device=gpu", "device cannot be 'gpu'", "auto, cpu, cuda"),
    case("torchrun-8", "", "16 ranks, and torchrun started 8", "start 16", env={"RANK": "0", "WORLD_SIZE": "8"}),
    case("srun-4", "", "16 ranks, and SLURM started 4", env={"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}),
    case("world-size", "", "WORLD_SIZE must be a whole number", env={"RANK": "0", "WORLD_SIZE": "many"}),
    case(
        "placement", "parallel.placement=inside", "cannot be 'inside' (did you mean slices_inside?)", "slices_across"
    ),
    case("across-one-host", "parallel.placement=slices_across", "all ranks are on one", "auto or slices_inside"),
    case(
        "inside-many-hosts",
        "parallel.placement=slices_inside",
        "a slice group on every host, and 16 ranks are 4 groups of m=4, for 8 hosts",
        "=auto, or m of 1, 2",
        env={"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "8"},
    ),
    case("online-no-key", "logger=wandb_online", "needs an API key for api.wandb.ai", "WANDB_API_KEY", "logger=none"),
    case("precision", "precision=fp16", "precision cannot be 'fp16'", "64-true, 32-true, bf16-true, 16-true"),
    case("seed-negative", "seed=-1", "seed must be at least 0, not -1"),
    case("run-folder", "hydra.run.dir=a/b", "hydra.run.dir", "not a folder", files={"a": ""}),
    # Keys and options
    case("key", "precison=32-true", "there is no key precison", "did you mean precision?"),
    case("key-nested", "workload.batchsize=4", "there is no key workload.batchsize", "mean workload.batch_size?"),
    case("key-elsewhere", "batch_size=4", "there is no key batch_size", "mean workload.batch_size?"),
    case("key-of-hydra", "hydra.run.folder=x", "there is no key hydra.run.folder", "keys of hydra.run: dir"),
    case("key-added", "+parallel.shedule=rows", "no key parallel.shedule", "did you mean parallel.schedule?"),
    case("key-forced", "++speed=1", "there is no key speed", "did you mean seed?"),
    case("key-twice", "+seed=1", "seed is there already", "write seed="),
    case("key-removed", "~seed", "seed is not given", "a whole number"),
    case("key-removed-nested", "~model.layers", "model.layers cannot be removed"),
    case("key-removed-absent", "~sed", "there is no key sed", "did you mean seed?"),
    case("group", "paralell=helix_4x4", "there is no key paralell", "did you mean parallel?"),
    case("group-added", "+parallel=single", "parallel is there already", "write parallel="),
    case("group-removed", "~model", "model is not given", "model=moe"),
    case("group-null", "model=null", "model=null names no option", "model=moe"),
    case("option-grid", "parallel=helix_2x6", "no parallel=helix_2x6", "parallel.m=2 parallel.n=6", "parallel=single"),
    case("option-misspelt", "model=mo", "there is no model=mo", "did you mean moe?", "model=dense"),
    case("option-empty", "logger=", "there is no logger=", "logger=wandb_online"),
    case("option-hardware", "hardware=tpu", "there is no hardware=tpu", "hardware=h200"),
    case("config-name", "--config-name train2", "there is no config 'train2'", "infer"),
    case("config-dir", "--config-dir nowhere", "--config-dir=nowhere is not a folder"),
    case(
        "config-file",
        "--config-dir x model=mine",
        "no key model.depth",
        "layers",
        files={"x/model/mine.yaml": "depth: 1"},
    ),
    case(
        "config-type", "--config-dir x model=mine", "model.rope takes true", files={"x/model/mine.yaml": "rope: 7.5"}
    ),
    case("config-yaml", "--config-dir x model=mine", "mine.yaml", files={"x/model/mine.yaml": "a: [1"}),
    # Types and grammar
    case("int-word", "parallel.m=four", "parallel.m takes a whole number, not four"),
    case("int-float", "model.layers=2.5", "model.layers takes a whole number, not 2.5"),
    case("int-null", "workload.runs=null", "workload.runs takes a whole number, not null"),
    case("int-or-null", "model.kv_heads=few", "model.kv_heads takes a whole number or null, not few"),
    case("bool-word", "model.rope=maybe", "model.rope takes true or false, not maybe"),
    case("float-word", "hardware.link_GB_per_s=fast", "hardware.link_GB_per_s takes a number or null, not fast"),
    case("float-nan", "hardware.link_GB_per_s=nan", "hardware.link_GB_per_s must be at least 0, not nan"),
    case("below-a-leaf", "parallel.m.x=1", "parallel.m takes a whole number"),
    case("interpolation", "model.name=${nowhere}", "model.name", "'nowhere' not found"),
    case("no-equals", "parallel.m", "cannot read 'parallel.m'", "write key=value"),
    case("no-key", "=3", "cannot read '=3'", "write key=value"),
    case("open-bracket", "parallel.m=[4", "cannot read 'parallel.m=[4'", "write key=value"),
    case("function", "parallel.m=twice(2)", "unknown function 'twice'", "write key=value"),
    case("comma", "parallel.m=2,4", "parallel.m=2,4 has several values", "add -m"),
    case("dashes", "--precision=32-true", "--precision=32-true", "write key=value"),
    case("two-modes", "-m --cfg job", "--multirun and --cfg cannot be given together"),
    case("resolve-alone", "--resolve", "--resolve belongs to --cfg", "--cfg job"),
    # Sweeps: one bad job and none starts
    case("sweep-grid", "-m parallel.m=3,5", "none of 2 jobs can run; job 0 (parallel.m=3): helix_3x4", "legal m:"),
    case("sweep-option", "-m parallel=helix_4x4,helix_3x4", "no parallel=helix_3x4", "parallel=helix_16x1"),
    case("sweep-key", "-m parallel.k=1,2", "there is no key parallel.k", "keys of parallel: method, m, n"),
    case("sweep-interval", "-m parallel.m=interval(1,4)", "no interval", "parallel.m=1,2,4"),
]


@pytest.fixture(scope="module")
def infer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("infer", ROOT / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 16 GB, no GPU, no launcher and no account, and an empty folder to be in."""
    for variable in (*LAUNCHERS, *ACCOUNT):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 16 * GB)
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    # Tests may run as root, who can read everything.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "secret" and access(path, mode))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def exit_code(main: Callable[[], None]) -> object:
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def check_refused(
    infer: ModuleType, machine: Path, capsys: pytest.CaptureFixture[str], expected: tuple[str, ...]
) -> None:
    """The command ends with code 2 and one sentence, in which the fragments are, and leaves nothing behind."""
    before = contents(machine)
    assert exit_code(infer.main) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("infer.py: error: ")
    assert said.err.count("\n") == 1
    for fragment in expected:
        assert fragment in said.err
    assert contents(machine) == before


def test_there_are_at_least_forty_kinds() -> None:
    assert len({one.name for one in CASES}) == len(CASES) >= 40


def check_case(
    one: Case, infer: ModuleType, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case's command line, in its files and environment, is refused as it says."""
    write(machine, one.files)
    for variable, value in one.env.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["infer.py", *one.arguments.split()])
    check_refused(infer, machine, capsys, one.expected)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_is_refused_in_one_sentence(
    one: Case,
    infer: ModuleType,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = set(sys.modules)
    check_case(one, infer, machine, monkeypatch, capsys)
    new = {module.partition(".")[0] for module in set(sys.modules) - loaded}
    assert not new & {"torch", "lightning", "deepspeed", "wandb"}


# As a user meets it: a fresh interpreter, by the clock. It says at its end whether torch was imported.
DRIVER = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
PROCESSES = [
    case("grid", "parallel=helix parallel.m=3 parallel.n=5", "helix_3x5", "legal m:"),
    case("key", "parallel.shedule=rows", "did you mean parallel.schedule?"),
    case("too-large", "model=paper_dense_4l model.layers=40000", "GB are available", "model=dense"),
    case("torchrun", "", "torchrun started 3", env={"RANK": "0", "WORLD_SIZE": "3"}),
    case("online", "logger=wandb_online", "WANDB_API_KEY"),
    case("sweep", "-m parallel.n=5,7 model=dense,moe", "none of 4 jobs can run", "n=5 does not divide heads=16"),
]


def run_process(arguments: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in (*LAUNCHERS, *ACCOUNT)}
    clean |= {"NETRC": str(folder / "no-netrc"), **env}
    command = [sys.executable, "-c", DRIVER, str(ROOT / "infer.py"), *arguments.split()]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=60)


def _seconds_of_children() -> float:
    """CPU time of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("one", PROCESSES, ids=lambda one: one.name)
def test_process_ends_within_five_seconds(one: Case, tmp_path: Path) -> None:
    """Of its own: what else runs on the machine, such as another test, is no fault of the command's."""
    before = _seconds_of_children()
    done = run_process(one.arguments, one.env, tmp_path)
    assert _seconds_of_children() - before < 5
    assert done.returncode == 2
    assert done.stderr.startswith("infer.py: error: ")
    assert done.stderr.count("\n") == 1
    for fragment in one.expected:
        assert fragment in done.stderr
    assert done.stdout == "False\n"
    assert contents(tmp_path) == set()


def test_only_one_rank_speaks(tmp_path: Path) -> None:
    done = run_process("", {"RANK": "1", "WORLD_SIZE": "3"}, tmp_path)
    assert done.returncode == 2
    assert done.stderr == ""

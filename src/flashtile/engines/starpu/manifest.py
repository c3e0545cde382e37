"""A folder of kernels compiled ahead of time (`flashtile aot`), read without Triton: which, and how to launch them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flashtile.engines.starpu import made
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.triton.aot import FORMAT, MANIFEST, parameters_of, program_of
from flashtile.kernels.triton.specialisation import Specialisation
from flashtile.spec import AttentionSpec

TILES = ("TILE_Q", "TILE_K")  # constants that are the folder's own choice
BLOCK_BYTES = 1024  # FT_BLOCK of launch.h
SCRATCH = ("global_scratch", "profile_scratch")  # NULL: kernels that want them are refused


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int
    multiple: int


@dataclass(frozen=True)
class Entry:
    """One kernel: what a launch needs, read from the manifest."""

    path: Path
    sha256: str
    function: str
    queries: int
    keys: int
    threads: int
    cluster: int
    shared: int
    nbytes: int
    parameters: tuple[Parameter, ...]
    refusal: str | None  # why tasks cannot launch it

    @property
    def id(self) -> int:
        """By which the launcher knows what it has loaded."""
        return int(self.sha256[:16], 16)

    def image(self) -> bytes:
        """The machine code. Raises: UnavailableError if the file is not what the manifest says."""
        try:
            code = self.path.read_bytes()
        except OSError as cause:
            raise UnavailableError(f"cuda_kernels: {self.path} cannot be read: {cause.strerror}") from cause
        if hashlib.sha256(code).hexdigest() != self.sha256:
            raise UnavailableError(f"cuda_kernels: {self.path} is not the file that {MANIFEST} tells of")
        return code


class Kernels:
    """The kernels of one folder, for one architecture.

    Raises: SpecError for a folder without a manifest of this format, or of an architecture that is not NVIDIA's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            told = json.loads(path.read_text())
            kind, self.arch = told["format"], str(told["arch"])
            self._entries = {_key_of(row): self._entry(row) for row in told["kernels"]} if kind == FORMAT else {}
            self._compiled: dict[Specialisation, Entry | None] = {}
        except OSError as cause:
            got = f"{self.folder}: {path.name}: {cause.strerror}"
            raise wrong("cuda_kernels", got, "the folder of an architecture, made by flashtile aot") from cause
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            raise wrong("cuda_kernels", f"{path}, which cannot be understood", "as flashtile aot writes it") from cause
        if kind != FORMAT or not self.arch.startswith("sm_"):
            raise wrong("cuda_kernels", f"format {kind} for {self.arch}", f"format {FORMAT} for sm_80 or newer")

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, what: Specialisation) -> Entry | None:
        """The kernel of a specialisation, with tiles and warps of the folder's choice; None if it is not there."""
        return self._entries.get(key_of(what))

    def compiled(self, what: Specialisation, spec: AttentionSpec) -> Entry | None:
        """A kernel of the kind that no folder has: compiled now, or found where another process has kept it; None
        without Triton's compiler."""
        if what not in self._compiled:
            found = made.folder_of(what, spec, self.arch)
            self._compiled[what] = None if found is None else Kernels(found).find(what)
        return self._compiled[what]

    def _entry(self, row: dict[str, Any]) -> Entry:
        launch, name = row["launch"], row["file"]
        if Path(name).name != name:
            raise ValueError(name)
        wants = [key for key, n in row["scratch"].items() if key.endswith("bytes_a_program") and n]
        wants += [key for key in ("cooperative", "programmatic_dependent") if launch[key]]
        wants += ["a grid of several axes"] * (launch["grid_y"] != 1 or launch["grid_z"] != 1)
        wants += ["more parameters"] * (row["parameter_bytes"] > BLOCK_BYTES)
        return Entry(
            path=self.folder / name,
            sha256=row["sha256"],
            function=row["function"],
            queries=row["queries"],
            keys=row["keys"],
            threads=launch["block"][0],
            cluster=launch["cluster"][0],
            shared=launch["dynamic_shared"],
            nbytes=row["parameter_bytes"],
            parameters=tuple(
                Parameter(p["name"], p["offset"], p["size"], p.get("multiple_of", 1)) for p in row["parameters"]
            ),
            refusal=f"kernel {row['name']} wants {', '.join(wants)}, which tasks do not give" if wants else None,
        )


def key_of(what: Specialisation) -> str:
    """By which a folder's kernels are found."""
    rows = [(row["name"], row["type"], row.get("multiple_of", 1)) for row in parameters_of(what)]
    return _key(what.kernel, dict(what.constants), rows, program_of(what))


def _key_of(row: dict[str, Any]) -> str:
    parameters = [(p["name"], p["type"], p.get("multiple_of", 1)) for p in row["parameters"]]
    return _key(row["kernel"], row["constants"], parameters, row.get("program"))


def _key(kernel: str, constants: dict[str, Any], parameters: list[tuple[str, str, int]], program: str | None) -> str:
    """What makes two kernels the same, but for the tiles."""
    kept = {name: value for name, value in constants.items() if name not in TILES}
    return json.dumps([kernel, kept, parameters, program], sort_keys=True)

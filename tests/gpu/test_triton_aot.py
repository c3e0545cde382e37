"""`flashtile aot`: files that are what the manifest says, and a manifest that says all that a launch needs."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from test_triton_code import TRITON

from flashtile import cli
from flashtile.errors import FlashtileError
from flashtile.kernels.triton import aot, installed_version, tiles
from flashtile.kernels.triton.resources import Parameter, of_cubin
from flashtile.kernels.triton.specialisation import padded

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def made(folder: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main(["aot", *arguments, "-o", str(folder)]) == 0
    return json.loads((folder / arguments[1] / aot.MANIFEST).read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("aot")
    return folder / "sm_90", made(folder, "--arch", "sm_90", "--head-size", "128", "--band", "band")


def test_every_file_is_what_the_manifest_says(built: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = built
    assert (manifest["format"], manifest["arch"]) == (aot.FORMAT, "sm_90") and manifest["triton"]
    names = [entry["name"] for entry in manifest["kernels"]]
    assert names == [
        "forward-bfloat16-d128-band-finished",
        "forward-bfloat16-d128-band-finished-contain",
        "merge-bfloat16-d128-finished",
    ]
    assert {file.name for file in folder.iterdir()} == {aot.MANIFEST, *(entry["file"] for entry in manifest["kernels"])}
    for entry in manifest["kernels"]:
        machine_code = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(machine_code).hexdigest() == entry["sha256"]
        used = of_cubin(machine_code, entry["function"])
        assert used.parameters == tuple(Parameter(row["offset"], row["size"]) for row in entry["parameters"])
        uses = entry["uses"]
        assert (uses["registers"], uses["stack"], uses["static_shared"]) == (
            used.registers,
            used.stack,
            used.static_shared,
        )
        assert (uses["spill_stores"], uses["spill_loads"]) == (used.local_stores, used.local_loads)
        assert (entry["tensor_instructions"], entry["instructions"]) == (used.tensor, used.instructions)


def test_a_launch_can_be_written_from_the_manifest_alone(built: tuple[Path, dict[str, Any]]) -> None:
    """Sizes, block, shared memory, grid in words of the call; and a block of parameters by offsets is C's struct."""
    entry = built[1]["kernels"][0]
    tile = tiles.row_of("sm_90", "bfloat16", 128).tile
    launch = entry["launch"]
    assert launch["block"] == [32 * tile.num_warps, 1, 1] and launch["cluster"] == [1, 1, 1]
    assert not launch["cooperative"] and not launch["programmatic_dependent"]
    assert launch["grid_x"].startswith("B * H") and (launch["grid_y"], launch["grid_z"]) == (1, 1)
    assert (entry["queries"], entry["keys"]) == (tile.tile_q, tile.tile_k)
    assert (entry["head_size"], padded(entry["head_size"])) == (128, entry["constants"]["HEAD"])
    assert entry["scratch"]["global_bytes_a_program"] == entry["scratch"]["profile_bytes_a_program"] == 0
    rows = {row["name"]: row for row in entry["parameters"]}
    assert rows["q"]["type"] == "*bf16" and rows["lse"]["type"] == "*fp32" and rows["scale"]["type"] == "i64"
    assert rows["q"]["multiple_of"] == rows["k_s"]["multiple_of"] == 16 and "multiple_of" not in rows["kv_len"]
    assert {"q_b", "q_h", "q_s", "first", "heads", "group", "q_len", "kv_len", "left", "right", "offset"} < set(rows)
    order = [row["name"] for row in entry["parameters"]]
    letters = {4: "i", 8: "q"}
    as_c = struct.Struct("@" + "".join(letters[rows[name]["size"]] for name in order))
    block = bytearray(entry["parameter_bytes"])
    for n, name in enumerate(order):
        struct.pack_into("<" + letters[rows[name]["size"]], block, rows[name]["offset"], n + 1)
    assert bytes(block) == as_c.pack(*range(1, len(order) + 1))


def test_states_and_alignment_are_chosen(tmp_path: Path) -> None:
    """What a runtime of tiles needs: a first tile, a tile that continues, and the merge that finishes."""
    found = list(aot.choose("sm_80", ["float32"], [64], states=["partial", "carried"], bands=["open"], aligned=False))
    states = [dict(one.specialisation.constants).get("STATE") for one in found]
    assert states == ["partial", "partial", "carried", "carried", None]
    assert not any(one.specialisation.divisible for one in found), "any address will do"
    every = list(aot.choose("sm_80", ["float32", "float16"], [64, 40], kernels=aot.KERNELS))
    names = [one.name for one in every]
    of_backward = 2 + 2 * 4  # every band is one there
    assert len(names) == len(set(names)) == 2 * 2 * (2 * 3 + 1 + of_backward + 3 + 1 + 1)
    assert "softmax-float32-d40" in names and "scores-float16-d64-open" in names


def test_gradients_are_chosen() -> None:
    """By the machine code: names, sizes and offsets of the parameters of the kernels of a call; partial ones, and those
    of what is not finite, are the same with more."""
    found = list(aot.choose("sm_90", ["bfloat16"], [128], kernels=["backward"], states=["finished", "partial"]))
    names = [one.name for one in found if "open" not in one.name]
    assert names[:4] == [
        "row_deltas-bfloat16-d128",
        "row_deltas-bfloat16-d128-dlse",
        "backward_q-bfloat16-d128-band-finished",
        "backward_kv-bfloat16-d128-band-finished",
    ]
    assert len(names) == 2 + 8 + 1 and names[-1] == "add_parts-bfloat16-d128"
    for one in found[1:4]:
        entry, machine_code = aot.compile_one(one, "sm_90")
        used = of_cubin(machine_code, entry["function"])
        assert used.parameters == tuple(Parameter(row["offset"], row["size"]) for row in entry["parameters"])
        assert "query_tiles" in entry["launch"]["grid_x"] or "key_tiles" in entry["launch"]["grid_x"]
    for arguments, message in (
        ((["bfloat16"], ["updated"]), "states: got updated, expected one of finished, partial, carried among them"),
        (
            (["float64"], ["finished"]),
            "aot: got gradients of float64 with head size 256, expected what sm_90 has tiles for",
        ),
    ):
        dtypes, states = arguments
        with pytest.raises(FlashtileError, match=message):
            list(aot.choose("sm_90", dtypes, [256], kernels=["backward"], states=states))


def test_the_command_prints_what_kernels_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = made(
        tmp_path, "--arch", "sm_80", "--dtype", "float64", "--head-size", "64", "--band", "open", "--kernels", "merge"
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "sm_80" and len(printed) == 1 + len(manifest["kernels"]) == 2
    assert "merge-float64-d64-finished" in printed[1] and "registers" in printed[1] and "0 spills" in printed[1]


@pytest.mark.slow
@pytest.mark.skipif(not str(installed_version()).startswith(TRITON), reason="the page shows what that one compiles")
def test_the_documentation_shows_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "--arch", "sm_80", "--dtype", "bfloat16", "--head-size", "64", "--band", "band")
    name = "forward-bfloat16-d64-band-finished"
    printed, shown = (
        [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
        for text in (capsys.readouterr().out, PAGE.read_text())
    )
    assert len(shown) == 1 and shown == printed

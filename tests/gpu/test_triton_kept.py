"""What is kept on the device between calls: by contents, for one stream, within a bound; what graphs read, for good."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from devices import DeviceArray, HostOwner

from flashtile import current
from flashtile.kernels.triton import kept
from flashtile.kernels.triton.device import Pointer


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostOwner]:
    kept.forget()
    monkeypatch.setattr(kept, "_of_graphs", {})
    yield HostOwner()
    kept.forget()


def find(owner: HostOwner, array: np.ndarray, device: int = 0) -> Pointer:
    with current.calling(owner, DeviceArray(np.zeros(1), device)) as here:
        return kept.find(here, array, "i32")


def uploads(owner: HostOwner) -> int:
    return sum(entry[0] == "upload" for entry in owner.diary)


def test_one_copy_of_the_same_contents_on_a_stream(owner: HostOwner) -> None:
    table = np.arange(9, dtype=np.int32)
    first = find(owner, table)
    assert np.array_equal(first.keep.array, table) and find(owner, table.copy()) == first and uploads(owner) == 1
    table[3] = 7
    assert find(owner, table) != first and np.array_equal(find(owner, table).keep.array, table) and uploads(owner) == 2
    assert find(owner, table, device=1) != find(owner, table) and uploads(owner) == 3, "another stream"
    assert find(owner, np.zeros(0, np.int32)).address, "nothing to read, but somewhere"


def test_what_was_not_read_for_longest_goes_first(owner: HostOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.full(10, n, np.int32) for n in range(4)]
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * arrays[0].nbytes)
    for array in (*arrays[:3], arrays[0], arrays[3]):
        find(owner, array)
    assert uploads(owner) == 4 and kept._bytes == kept.MOST_BYTES
    for array in (arrays[0], arrays[2], arrays[3]):
        find(owner, array)
    assert uploads(owner) == 4
    find(owner, arrays[1])
    assert uploads(owner) == 5
    monkeypatch.setattr(kept, "MOST_ARRAY_BYTES", 39)
    assert find(owner, arrays[0]) != find(owner, arrays[0]), "large ones are copied"


def test_a_graph_reads_what_is_there_and_leaves_nothing_behind(owner: HostOwner) -> None:
    """What a graph copies is not copied until it is replayed; what it reads must stay."""
    known, new = np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32)
    before = find(owner, known)
    owner.recording = True
    assert find(owner, known) == before and find(owner, new) != find(owner, new)
    owner.recording = False
    kept.forget()
    assert [x.keep for x in kept._of_graphs.values()] == [before.keep]
    assert uploads(owner) == 3 and find(owner, new) and uploads(owner) == 4


def test_threads_find_their_own_contents(owner: HostOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.full(8, n, np.int32) for n in range(6)]
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * arrays[0].nbytes)
    wrong: list[int] = []

    def work(shift: int) -> None:
        mine = HostOwner()  # its diary is no other thread's
        for n in range(300):
            array = arrays[(n + shift) % 6]
            if not np.array_equal(find(mine, array).keep.array, array):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 <= kept._bytes <= kept.MOST_BYTES == sum(len(key[-1]) for key in kept._arrays)

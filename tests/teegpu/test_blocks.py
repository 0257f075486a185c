from __future__ import annotations

import itertools
import threading

import pytest
import torch

from teegpu import blocks


def test_blocks_are_all_rows_once_and_small() -> None:
    for rows, columns in ((1, 1), (5, 2**20), (1000, 100), (0, 8), (328, 100)):
        found = [list(range(block.start, block.stop)) for block in blocks.blocks(slice(0, rows), columns)]
        assert list(itertools.chain(*found)) == list(range(rows))
        assert all(len(block) * columns <= max(columns, blocks.VALUES) for block in found)
    assert [block.start for block in blocks.blocks(slice(7, 10), 2**15)] == [7, 8, 9]


@pytest.mark.parametrize(
    ("rows", "columns", "parts"), [(9, 8, 1), (2, 2**20, 2), (1, 2**22, 1), (700, 1024, 3), (0, 1, 1)]
)
def test_what_is_worth_it_is_done_by_several_threads_and_all_of_it_once(rows: int, columns: int, parts: int) -> None:
    met = threading.Barrier(parts)
    done: list[int] = []

    def work(part: slice) -> None:
        met.wait(10)  # nobody goes on before all parts have begun
        done.extend(range(part.start, part.stop))

    torch.set_num_threads(3)
    blocks.spread(work, rows, columns)
    assert sorted(done) == list(range(rows))


def test_what_a_thread_raises_is_raised() -> None:
    def work(part: slice) -> None:
        if part.start:
            raise ValueError("in another thread")

    torch.set_num_threads(3)
    with pytest.raises(ValueError, match="in another thread"):
        blocks.spread(work, 700, 1024)

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu import ring
from teegpu.errors import ShieldError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import padmaker, pads, padsegment, padstore, sealed
from teegpu.tee.shield.facts import Product, products, quantised
from teegpu.tee.shield.padledger import Ledger, path_of
from teegpu.tee.shield.padmaker import PadMaker
from teegpu.tee.shield.pads import PadMask, PadSource
from teegpu.tee.shield.padstore import Pool, pool_folder
from tests.conftest import TinyModel

O_PROJ: Product = ("layers.1.o_proj",)
HEAD: Product = ("lm_head",)


class World:
    """A tiny model, its matrices, and the place of its pads."""

    def __init__(self, model: ModelFolder, data: Path) -> None:
        self.spec = read_spec(model)
        self.store = WeightStore(model, self.spec)
        self.digest = self.store.digest()
        self.data = sealed.data_folder(str(data))
        self.folder = pool_folder(self.data, self.digest)
        self.model = model
        self.products = products(self.spec)
        self.matrices = {p: ring.RingMatrix(quantised(self.store, self.spec, p)[0]) for p in self.products}
        self.notes: list[str] = []

    def make(self, tokens: int, heads: int = 8, notify: Callable[[str, float | None], None] = lambda *_: None) -> Any:
        maker = PadMaker(self.store, self.spec, self.digest, self.data, "tiny")
        maker.run(tokens, heads, notify)
        return maker.made

    def pool(self) -> Pool:
        return Pool(self.folder, self.digest, self.spec, sealed.SealKey.load(), self.notes.append)

    def source(self, **options: Any) -> PadSource:
        return PadSource(self.pool(), notify=self.notes.append, **options)

    def check(self, product: Product, mask: PadMask, seed: int = 0) -> None:
        """Masked and unmasked, a product is what it is."""
        values = torch.randint(-1000, 1000, mask.operand.shape, generator=torch.Generator().manual_seed(seed))
        values = values.to(torch.int32)
        matrix = self.matrices[product]
        answer = matrix.product(values + mask.operand)
        assert torch.equal(answer - mask.correction(), matrix.product(values))


@pytest.fixture
def world(tiny_model: TinyModel, tmp_path: Path) -> Iterator[World]:
    made = World(tiny_model("llama"), tmp_path / "data")
    yield made
    made.store.close()


def rows_of(mask: PadMask) -> list[bytes]:
    return [row.numpy().tobytes() for row in mask.operand]


# What pads are


def test_corrections_are_exact_and_no_row_comes_twice(world: World) -> None:
    world.make(150, 16)
    source = world.source()
    seen: set[bytes] = set()
    count = 0
    for rows in (1, 1, 5, 9, 24, 1, 60, 3):
        for number, product in enumerate(world.products):
            wanted = 1 if product == HEAD else rows
            mask = source.take(product, wanted)
            assert mask.operand.shape == (wanted, world.matrices[product].shape[1])
            seen |= set(rows_of(mask))
            count += wanted
            world.check(product, mask, number)
    assert len(seen) == count
    assert source.left() == {"body": 152 - 104, "head": 8}
    source.close()
    source.close()


def test_corrections_may_come_late_and_in_any_order(world: World) -> None:
    world.make(64)
    source = world.source()
    masks = [source.take(O_PROJ, rows) for rows in (3, 8, 20, 1)]
    source.close()  # the pool is gone, the masks are on their way
    for mask in reversed(masks):
        world.check(O_PROJ, mask)
    with pytest.raises(RuntimeError, match="once"):
        masks[0].correction()


def test_pads_are_uniform(world: World) -> None:
    world.make(1024)
    values = world.source().take(O_PROJ, 1024).operand.flatten()
    bits = torch.stack([(values >> bit) & 1 for bit in range(32)]).to(torch.float64).mean(-1)
    assert ((bits - 0.5).abs() < 4.5 * 0.5 / values.numel() ** 0.5).all()
    bytes_ = values.view(torch.uint8).to(torch.int64)
    expected = bytes_.numel() / 256
    chi_squared = float(((torch.bincount(bytes_, minlength=256) - expected) ** 2 / expected).sum())
    assert 150 < chi_squared < 380  # 255 degrees of freedom: mean 255, standard deviation 22.6


def test_what_is_on_the_disk_is_sealed(world: World) -> None:
    world.make(16)
    mask = world.source().take(O_PROJ, 16)
    pad, correction = mask.operand.numpy().tobytes(), mask.correction().numpy().tobytes()
    for path in [*world.folder.iterdir(), *sealed.state_folder().rglob("*")]:
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
            content = path.read_bytes()
            assert pad[:32] not in content
            assert correction[:32] not in content


def test_a_chunk_is_one_read_for_each_product(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.make(128)
    source = world.source()
    mask = source.take(O_PROJ, 128)
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (reads.append(args), preadv(*args))[1])
    world.check(O_PROJ, mask)
    assert len(reads) == 1


# Once, across processes and crashes


def in_a_process(work: Callable[[Callable[[bytes], Any]], None]) -> tuple[int, int]:
    """Starts ``work`` in a process of its own, a copy of this one; → its id, and a pipe of what it writes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            work(lambda text: os.write(writer, text))
        finally:
            os._exit(0)
    os.close(writer)
    return pid, reader


def all_of(reader: int) -> bytes:
    with open(reader, "rb") as file:
        return file.read()


def test_a_process_that_is_killed_between_claim_and_use_has_spent_its_pads(world: World) -> None:
    world.make(64)

    def work(write: Callable[[bytes], Any]) -> None:
        write(world.source().take(O_PROJ, 20).operand.numpy().tobytes())
        os.kill(os.getpid(), signal.SIGKILL)

    pid, reader = in_a_process(work)
    used = all_of(reader)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    width = world.matrices[O_PROJ].shape[1] * 4
    known = {used[start : start + width] for start in range(0, len(used), width)}
    assert len(known) == 20
    source = world.source()
    mask = source.take(O_PROJ, 40)
    assert not known & set(rows_of(mask))
    world.check(O_PROJ, mask)
    assert source.left()["body"] == 0


def test_processes_that_claim_at_once_get_different_pads(world: World) -> None:
    world.make(800)
    start_reader, start_writer = os.pipe()

    def work(write: Callable[[bytes], Any]) -> None:
        os.close(start_writer)
        pool = world.pool()
        os.read(start_reader, 1)
        while leaves := pool.claim("body", 1):
            write(f"{leaves[0].segment.start + leaves[0].index}\n".encode())

    processes = [in_a_process(work) for _ in range(4)]
    os.close(start_reader)
    os.close(start_writer)  # they all begin
    got = [[int(line) for line in all_of(reader).split()] for _, reader in processes]
    for pid, _ in processes:
        assert os.waitpid(pid, 0)[1] == 0
    assert sorted(leaf for leaves in got for leaf in leaves) == list(range(100))
    assert all(leaves == sorted(leaves) for leaves in got)


@pytest.mark.parametrize("step", ["first slot", "second slot", "mark", "unlink"])
def test_a_crash_within_a_claim_hands_nothing_out_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    world.make(256)
    first = world.pool()
    [leaf] = first.claim("body", 1)
    known = leaf.pads(3).numpy().tobytes()
    real_write, real_sync, calls = os.pwrite, os.fdatasync, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        calls.append("pwrite")
        if step == "first slot":
            return real_write(descriptor, bytes(data)[:50], offset)  # torn
        return real_write(descriptor, data, offset)

    def fdatasync(descriptor: int) -> None:
        calls.append("sync")
        stop_at = {"first slot": 1, "second slot": 2, "mark": 3}.get(step)
        if calls.count("sync") == stop_at:
            raise KeyboardInterrupt
        real_sync(descriptor)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(os, "fdatasync", fdatasync)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            first.claim("body", 16)  # ends the first segment, begins the second
    second = world.pool()
    after = second.claim("body", 1)[0]
    number = after.segment.start + after.index
    # Where the ledger was not written, nothing was handed out.
    assert number == (1 if step == "first slot" else 17)
    assert after.pads(3).numpy().tobytes() != known
    assert second.left()["body"] == 256 - 8 * (number + 1)
    assert sorted(part.start for part in second.parts() if part.kind == "body") == [0, 16][number // 16 :]


def test_spent_pads_are_gone(world: World) -> None:
    world.make(256)
    pool = world.pool()
    before = path_of(pool.id).read_bytes()
    leaves = pool.claim("body", 20)
    assert [part.start for part in pool.parts() if part.kind == "body"] == [16]
    after = path_of(pool.id).read_bytes()
    # Both slots were overwritten: with the key of an old one every later leaf could be read.
    assert len(after) == len(before) == 8192
    for slot in (0, 4096):
        assert after[slot : slot + 100] != before[slot : slot + 100]
    assert len({leaf.pads(0).numpy().tobytes() for leaf in leaves}) == 20


def test_a_pool_from_a_backup_gives_nothing_again(world: World, tmp_path: Path) -> None:
    world.make(256)
    shutil.copytree(world.folder, tmp_path / "backup")
    pool = world.pool()
    used = {leaf.pads(0).numpy().tobytes() for leaf in pool.claim("body", 20)}
    pool.close()
    shutil.rmtree(world.folder)
    shutil.copytree(tmp_path / "backup", world.folder)
    again = world.pool()
    assert again.left()["body"] == 256 - 160
    leaves = again.claim("body", 12)
    assert not used & {leaf.pads(0).numpy().tobytes() for leaf in leaves}
    assert leaves[0].segment.start + leaves[0].index == 20
    assert again.claim("body", 1) == []
    assert "spent before" in world.notes[0]
    assert [part.kind for part in again.parts()] == ["head"]
    again.close()


def test_a_ledger_from_a_backup_is_refused(world: World) -> None:
    world.make(256)
    pool = world.pool()
    path = path_of(pool.id)
    old = path.read_bytes()
    pool.claim("body", 20)
    pool.close()
    path.write_bytes(old)
    with pytest.raises(ShieldError, match=r"older than the pads .* pads rm"):
        world.pool().claim("body", 1)


def test_a_ledger_that_is_lost_or_damaged_is_refused(world: World) -> None:
    world.make(16)
    path = path_of(world.pool().id)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert world.pool().left()["body"] == 16  # the other slot is whole
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ShieldError, match="damaged"):
        world.pool().left()
    path.unlink()
    with pytest.raises(ShieldError, match=r"no ledger here .* 'teegpu pads rm'"):
        world.pool()
    with pytest.raises(ShieldError, match="no ledger here"):
        world.make(8)
    assert padstore.destroy(world.folder, sealed.SealKey.load()) > 0
    assert not world.folder.exists()
    world.make(8)
    assert world.pool().left()["body"] == 8


def test_a_pool_that_was_removed_can_not_be_copied_back(world: World, tmp_path: Path) -> None:
    world.make(16)
    shutil.copytree(world.folder, tmp_path / "backup")
    padstore.destroy(world.folder, sealed.SealKey.load())
    shutil.copytree(tmp_path / "backup", world.folder)
    with pytest.raises(ShieldError, match="no ledger here"):
        world.pool()


@pytest.mark.parametrize("what", ["ledger", "segment", "folder", "seal.key"])
def test_what_others_can_read_is_refused(world: World, what: str) -> None:
    world.make(16)
    path = {
        "ledger": path_of(world.pool().id),
        "segment": world.folder / padsegment.file_name("body", 0, 2),
        "folder": world.folder,
        "seal.key": sealed.state_folder() / "seal.key",
    }[what]
    path.chmod(0o755 if path.is_dir() else 0o644)
    with pytest.raises(ShieldError, match=r"others on this machine .* chmod"):
        world.source().take(O_PROJ, 1)


def test_a_changed_segment_is_noticed(world: World) -> None:
    world.make(16)
    path = world.folder / padsegment.file_name("body", 0, 2)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # in the last product of the second leaf
    path.write_bytes(content)
    source = world.source()
    last = world.products[-2]
    world.check(last, source.take(last, 8))
    with pytest.raises(sealed.DamagedError):
        source.take(last, 8).correction()
    world.make(8)
    path = world.folder / padsegment.file_name("body", 2, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(sealed.DamagedError):
        world.source().take(O_PROJ, 8)


def test_another_models_pads_are_refused(world: World) -> None:
    world.make(8)
    with pytest.raises(ShieldError, match="another model"):
        Pool(world.folder, "0" * 64, world.spec, sealed.SealKey.load())
    (world.folder / "pool.json").write_text("{}")
    with pytest.raises(ShieldError, match="damaged"):
        world.pool()
    padstore.destroy(world.folder, sealed.SealKey.load())
    with pytest.raises(FileNotFoundError):
        world.pool()


# Exhausted


def test_an_exhausted_pool_ends_the_run(world: World) -> None:
    world.make(16)
    source = world.source()
    source.take(O_PROJ, 10)
    with pytest.raises(ShieldError, match=r"20 for the layers are needed, and 0 are there.*pads make"):
        source.take(O_PROJ, 20)
    source.take(HEAD, 8)
    with pytest.raises(ShieldError, match="lm_head"):
        source.take(HEAD, 1)
    world.check(O_PROJ, source.take(O_PROJ, 6))  # what was claimed is used


def test_a_run_may_wait_for_pads(world: World) -> None:
    world.make(16)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            world.make(64)

    source = world.source(when_exhausted="wait", sleep=sleep)
    source.take(O_PROJ, 16)
    world.check(O_PROJ, source.take(O_PROJ, 33))
    assert len(waits) == 3
    assert len(world.notes) == 1
    assert "waiting for pads" in world.notes[0]


def test_old_segments_are_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pads, "_MOST_SEGMENTS", 3)
    monkeypatch.setattr(padmaker, "SEGMENT_LEAVES", 1)
    world.make(160)
    source = world.source()
    lagging = ("layers.1.down_proj",)
    early = source.take(lagging, 4)
    seen: set[bytes] = set()
    for _ in range(15):
        mask = source.take(O_PROJ, 9)
        seen |= set(rows_of(mask))
        world.check(O_PROJ, mask)
    assert len(seen) == 135
    assert source._pool.open_segments <= 6
    world.check(lagging, early)
    late = source.take(lagging, 9)  # not from where it was: those pads are gone
    world.check(lagging, late)
    assert not set(rows_of(early)) & set(rows_of(late))


# Making


def test_pads_are_added_to_a_pool_in_use(world: World) -> None:
    made = world.make(100, 3)
    assert made.tokens == {"body": 104, "head": 8}
    assert made.per_token("body") > 0
    source = world.source()
    source.take(O_PROJ, 30)
    world.make(100, 0)
    assert source.left() == {"body": 104 - 32 + 104, "head": 8}
    for _ in range(17):
        world.check(O_PROJ, source.take(O_PROJ, 10))
    assert padstore.read_pool(world.folder)["seconds_per_token"].keys() == {"body", "head"}


def test_up_to_makes_what_is_missing(world: World) -> None:
    world.make(64, 8)
    maker = PadMaker(world.store, world.spec, world.digest, world.data, "tiny")
    assert maker.run(100, 8, lambda *_: None, up_to=True).tokens == {"body": 40, "head": 0}


def test_an_interrupt_keeps_what_is_whole(world: World) -> None:
    told = []

    def notify(text: str, share: float | None) -> None:
        told.append((text, share))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.make(512, notify=notify)
    assert "128 of 512 tokens, about" in told[1][0]
    assert world.pool().left() == {"body": 256, "head": 0}
    world.check(O_PROJ, world.source().take(O_PROJ, 256))


@pytest.mark.parametrize("place", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_a_smaller_pool(world: World, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    real = getattr(os, place)
    world.make(8)  # pool and ledger are there
    calls = []

    def limited(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > {"posix_fallocate": 1, "pwrite": 12, "fsync": 1}[place]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, place, limited)
        with pytest.raises(ShieldError, match="no space left"):
            world.make(512, 0)
    left = world.pool().left()["body"]
    assert left in (8, 136)
    world.check(O_PROJ, world.source().take(O_PROJ, left))
    assert [path.name for path in world.folder.iterdir() if path.name.endswith("~")] == []


def test_a_disk_that_is_too_small_is_told_before_the_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1e6, used=0, free=200_000))
    with pytest.raises(ShieldError, match=r"tokens fit.*shield\.dir"):
        world.make(100_000)
    assert world.pool().left() == {"body": 0, "head": 0}


def test_leftovers_of_a_killed_maker_go(world: World) -> None:
    world.make(8)
    leftover = world.folder / ".body-0000000001-16.pads~"
    leftover.write_bytes(b"x")
    world.make(8)
    assert not leftover.exists()


def test_the_limit_on_a_files_size_is_a_full_disk_too(world: World) -> None:
    """For real: a process that may not write the second segment keeps the first."""

    def work(write: Callable[[bytes], Any]) -> None:
        torch.set_num_threads(1)  # threads do not outlive a fork

        def notify(text: str, share: float | None) -> None:
            if "128 of" in text:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        try:
            world.make(256, 0, notify)
        except ShieldError as error:
            write(str(error).encode())

    pid, reader = in_a_process(work)
    assert b"no space left" in all_of(reader)
    assert os.waitpid(pid, 0)[1] == 0
    assert world.pool().left()["body"] == 128


def test_the_ledger_does_not_go_back(world: World) -> None:
    world.make(16)
    pool = world.pool()
    with Ledger(pool.id, sealed.SealKey.load()).locked() as places, pytest.raises(ValueError, match="spent"):
        places["body"].at(3).at(2)

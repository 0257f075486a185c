"""Machines made of files: cores, quotas, processors and trusted environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teegpu import machine


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("contents", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 4),
        # the group above is the tighter one
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            },
            3,
        ),
        # a part of a core is no core, but there is always one
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # a container that sees a path outside of its own view
        ({"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/job\n1:memory:/\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
    ],
)
def test_available_cores(contents: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert machine.available_cores(files(tmp_path, contents)) == cores


def test_available_cores_here() -> None:
    assert 1 <= machine.available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("cores", "split"),
    [(1, (1, 1)), (2, (1, 1)), (3, (1, 2)), (4, (2, 2)), (8, (3, 5)), (16, (6, 10)), (64, (24, 40))],
)
def test_embedded_split(cores: int, split: tuple[int, int]) -> None:
    assert machine.thread_split(True, cores) == split


@pytest.mark.parametrize("cores", range(1, 129))
def test_an_embedded_split_never_oversubscribes(cores: int) -> None:
    runner, server = machine.thread_split(True, cores)
    assert min(runner, server) >= 1
    assert not machine.oversubscribed(runner, server, cores)
    assert cores == 1 or runner + server == cores


@pytest.mark.parametrize("cores", [1, 2, 16, 64])
def test_alone_each_has_all_cores(cores: int) -> None:
    assert machine.thread_split(False, cores) == (cores, cores)


def test_split_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    assert machine.thread_split(True) == (3, 5)


@pytest.mark.parametrize(
    ("runner", "server", "cores", "over"),
    [(1, 1, 2, False), (2, 1, 2, True), (2, 2, 2, True), (1, 1, 1, False), (2, 1, 1, True), (8, 8, 16, False)],
)
def test_oversubscribed(runner: int, server: int, cores: int, over: bool) -> None:
    assert machine.oversubscribed(runner, server, cores) is over


def cpuinfo(flags: str) -> dict[str, str]:
    return {
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: none\n"
    }


@pytest.mark.parametrize(
    ("contents", "kind", "evidence"),
    [
        ({}, "none", ()),
        ({"dev/attestation/attestation_type": "dcap"}, "sgx", ("/dev/attestation/attestation_type",)),
        ({"dev/tdx_guest": ""}, "tdx", ("/dev/tdx_guest",)),
        ({"dev/tdx-guest": ""}, "tdx", ("/dev/tdx-guest",)),
        (cpuinfo("fpu tdx_guest"), "tdx", ("processor flag tdx_guest",)),
        (
            {"sys/kernel/config/tsm/report/one/provider": "tdx_guest\n"},
            "tdx",
            ("configfs-tsm provider tdx_guest",),
        ),
        ({"dev/sev-guest": ""}, "sev-snp", ("/dev/sev-guest",)),
        ({"sys/devices/system/cpu/sev/vmpl": "0\n"}, "sev-snp", ("/sys/devices/system/cpu/sev/vmpl",)),
        (
            {"dev/sev-guest": "", "sys/kernel/config/tsm/report/one/provider": "sev_guest\n"},
            "sev-snp",
            ("/dev/sev-guest", "configfs-tsm provider sev_guest"),
        ),
        # a host that can make enclaves or guests is not inside of one
        ({"dev/sgx_enclave": ""}, "none", ()),
        ({"dev/sev": "", **cpuinfo("sev sev_es sev_snp")}, "none", ()),
    ],
)
def test_tee(contents: dict[str, str], kind: str, evidence: tuple[str, ...], tmp_path: Path) -> None:
    root = files(tmp_path, contents)
    found = machine.tee(root)
    assert (found.kind, found.evidence) == (kind, evidence)
    assert machine.tee_kind(root) == kind
    assert ("not attested" in found.note) == (kind != "none")
    assert ("development mode" in found.note) == (kind == "none")


def test_a_host_is_told_what_it_could_do(tmp_path: Path) -> None:
    root = files(tmp_path, {"dev/sgx_enclave": ""})
    assert "/dev/sgx_enclave: this machine can host a TEE, but this process is not inside one" in machine.tee(root).note


def test_processor(tmp_path: Path) -> None:
    root = files(tmp_path, cpuinfo("fpu amx_bf16 avx2 avx512_bf16 other"))
    assert machine.cpu_features(root) == ("avx2", "avx512_bf16", "amx_bf16")
    assert machine.cpu_name(root) == "Some CPU"


def test_an_arm_processor(tmp_path: Path) -> None:
    root = files(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd bf16 sve\n"})
    assert machine.cpu_features(root) == ("sve", "bf16")
    assert machine.cpu_name(root)


def test_memory(tmp_path: Path) -> None:
    root = files(tmp_path, {"proc/meminfo": "MemTotal:  2048 kB\n", "proc/self/status": "Name: x\nVmHWM:\t 512 kB\n"})
    assert machine.memory_bytes(root) == 2 * 2**20
    assert machine.peak_memory_bytes(root) == 2**19
    assert machine.memory_bytes(tmp_path / "nothing") == 0


def test_peak_memory_grows_with_use() -> None:
    before = machine.peak_memory_bytes()
    block = bytearray(os.urandom(1)) * (before + 2**26)
    assert machine.peak_memory_bytes() >= len(block)


def test_peak_memory_without_proc(tmp_path: Path) -> None:
    assert machine.peak_memory_bytes(tmp_path) > 2**20


def test_memory_of_another_process(tmp_path: Path) -> None:
    root = files(tmp_path, {"proc/7/status": "VmHWM:\t 512 kB\n", "proc/7/statm": "900 3 1 1 0 5 0\n"})
    assert machine.peak_memory_bytes(root, pid=7) == 2**19
    assert machine.resident_bytes(root, pid=7) == 3 * os.sysconf("SC_PAGESIZE")
    assert machine.peak_memory_bytes(root, pid=8) == machine.resident_bytes(root, pid=8) == 0
    assert machine.resident_bytes() > 2**20


def test_describe(tmp_path: Path) -> None:
    described = machine.describe(files(tmp_path, cpuinfo("avx2")))
    assert described["cpu"] == "Some CPU"
    assert described["cpu_features"] == ["avx2"]
    assert set(described) == {"architecture", "cpu", "cpu_features", "cores", "memory_bytes", "kernel", "python"}


def test_the_allocator_takes_the_advice() -> None:
    """In a process of its own: it is for good. A freed buffer is used again, so a second one clears no new pages."""
    code = """
import resource
from teegpu import machine
assert machine.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(40 << 20)
before = faults()
for _ in range(10):
    bytearray(40 << 20)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 10_000  # each buffer that is mapped anew takes 10,240 faults


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were not loaded yet."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(("cores", "shared"), [(1, True), (2, True), (4, True), (5, False), (64, False)])
def test_threads_sleep_while_they_wait_on_few_cores(monkeypatch: pytest.MonkeyPatch, cores: int, shared: bool) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    environ = {"HOME": "/"}
    machine.share_cores(environ)
    assert machine.shares_cores(environ) is shared
    assert machine.without_sharing(environ) == {"HOME": "/"}


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(("running", "spins"), [(1, 10_000), (0, 10_000), (2, 1_000)])
def test_threads_wait_longer_where_nobody_else_wants_the_cores(
    monkeypatch: pytest.MonkeyPatch, running: int, spins: int
) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    monkeypatch.setattr(machine, "running_processes", lambda: running)
    environ = {"HOME": "/"}
    machine.share_cores(environ, alone=True)
    assert environ["GOMP_SPINCOUNT"] == str(spins)
    assert machine.without_sharing(environ) == {"HOME": "/"}


def test_running_processes_are_the_kernels(tmp_path: Path) -> None:
    assert machine.running_processes() >= 1
    (tmp_path / "proc").mkdir()
    assert machine.running_processes(tmp_path) == 0
    (tmp_path / "proc" / "stat").write_text("cpu  1 2\nprocs_running 5\nprocs_blocked 0\n")
    assert machine.running_processes(tmp_path) == 5


@pytest.mark.usefixtures("no_torch")
def test_what_a_user_set_for_openmp_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    for wish in ("active", "PASSIVE"):
        environ = {"OMP_WAIT_POLICY": wish}
        machine.share_cores(environ)
        assert environ == machine.without_sharing(environ) == {"OMP_WAIT_POLICY": wish}
        assert machine.shares_cores(environ) is (wish == "PASSIVE")


def test_once_torch_is_loaded_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", machine)  # any module will do
        machine.share_cores(environ)
    assert not environ


def test_those_that_take_turns_have_all_cores_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert machine.thread_split(True, 4) == (4, 4)
    assert machine.thread_split(True, 4, servers=2) == (4, 2)
    assert machine.thread_split(True, 1, servers=2) == (1, 1)
    assert not machine.oversubscribed(2, 2, 2, shared=True)
    assert machine.oversubscribed(3, 1, 2, shared=True)


# Memory that more processes may take


def write_memory(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_the_kernel_estimates(tmp_path: Path) -> None:
    write_memory(tmp_path, proc__meminfo="MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n")
    assert machine.available_bytes(tmp_path) == 40 * 1024


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    write_memory(
        tmp_path,
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="0::/a/b\n",
        sys__fs__cgroup__a__b__memory_dot_max="max\n",
        sys__fs__cgroup__a__b__memory_dot_current="5\n",
        sys__fs__cgroup__a__memory_dot_max="5000\n",
        sys__fs__cgroup__a__memory_dot_current="3000\n",
        sys__fs__cgroup__a__memory_dot_stat="active_file 1\ninactive_file 700\n",
    )
    assert machine.available_bytes(tmp_path) == 5000 - 3000 + 700


def test_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    assert machine.available_bytes(tmp_path) is None


def test_this_machine_has_some() -> None:
    found = machine.available_bytes()
    assert found is None or found > 0


def test_processor_seconds_of_the_machine(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc").mkdir()
    # user nice system idle iowait irq softirq steal guest
    row = [3 * tick, 0, 2 * tick, 90 * tick, 5 * tick, 0, tick, 4 * tick, 0]
    stat = "cpu  " + " ".join(map(str, row)) + "\ncpu0 1\ncpu1 1\nprocs_running 1\n"
    (tmp_path / "proc" / "stat").write_text(stat)
    assert machine.machine_cpu_seconds(tmp_path) == (2, 6.0, 4.0)
    assert machine.machine_cpu_seconds(tmp_path / "nothing") == (0, 0.0, 0.0)
    assert machine.machine_cpu_seconds()[1] > machine.cpu_seconds() > 0

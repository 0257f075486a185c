"""How much memory there is, as the kernel's files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from teegpu.bench.memory import available_bytes, case_bytes, server_bytes
from teegpu.model.reader import read_spec
from tests.conftest import TinyModel


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_the_kernel_estimates(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo="MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n")
    assert available_bytes(tmp_path) == 40 * 1024


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="0::/a/b\n",
        sys__fs__cgroup__a__b__memory_dot_max="max\n",
        sys__fs__cgroup__a__b__memory_dot_current="5\n",
        sys__fs__cgroup__a__memory_dot_max="5000\n",
        sys__fs__cgroup__a__memory_dot_current="3000\n",
        sys__fs__cgroup__a__memory_dot_stat="active_file 1\ninactive_file 700\n",
    )
    assert available_bytes(tmp_path) == 5000 - 3000 + 700


def test_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_this_machine_has_some() -> None:
    found = available_bytes()
    assert found is None or found > 0


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 4), ("auto", 4), ("bf16", 2), ("fp16", 2)])
def test_needs_grow_with_the_weights(tiny_model: TinyModel, dtype: str, each: int) -> None:
    spec = read_spec(tiny_model("llama"))
    process = server_bytes(spec, dtype) - spec.parameters * each
    assert process > 0
    assert case_bytes(spec, all_weights=True, dtype=dtype) == process + spec.parameters * each
    assert case_bytes(spec, all_weights=False) == process + spec.vocab_size * spec.hidden_size * 4

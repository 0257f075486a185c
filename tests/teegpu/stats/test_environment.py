"""When a run began, and what it ran on."""

from __future__ import annotations

import json
import os
from datetime import datetime

import pytest

from teegpu.stats import environment
from teegpu.stats.environment import Start


def test_a_start_has_an_id_of_its_own() -> None:
    one, two = Start.now(), Start.now()
    assert one.id != two.id
    assert datetime.fromisoformat(one.at).tzinfo is not None
    assert one.id.startswith(one.at[:10].replace("-", ""))


def test_the_environment_says_what_a_run_ran_on() -> None:
    found = environment.describe()
    assert list(found) == ["machine", "cpu", "cores", "memory_bytes", "system", "python", "torch", "teegpu"]
    assert all(found.values())
    assert os.uname().nodename not in json.dumps(found).split()


def test_what_others_do_is_told_from_what_this_process_and_its_children_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_s = iter([(2, 100.0, 1.0), (2, 130.0, 3.0)])
    family_s = iter([40.0, 50.0])
    clock = iter([1000.0, 1010.0])
    monkeypatch.setattr(environment.machine, "machine_cpu_seconds", lambda: next(machine_s))
    monkeypatch.setattr(environment.machine, "cpu_seconds", lambda: next(family_s))
    monkeypatch.setattr(environment.time, "monotonic", lambda: next(clock))
    assert environment.Load().to_json() == {"cores": 2, "other_cores": 2.0, "stolen_cores": 0.2}


def test_a_kernel_that_says_nothing_is_no_idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.machine, "machine_cpu_seconds", lambda: (0, 0.0, 0.0))
    assert environment.Load().to_json() == {}

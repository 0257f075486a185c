"""``make fuzz``: every target for its share of the time, with atheris where it is installed, else with random damage.

    python -m tests.fuzz --seconds 600
    python -m tests.fuzz --target reply --input .fuzz/reply/crash-…    once more what was found

What crashes is kept in ``.fuzz/<target>``, and so is the corpus of what atheris found to be new: the next time begins
there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(".fuzz")
GROWTH_BYTES = 64 * 2**20
ATHERIS_GROWTH_MIB = 1024
"""What libFuzzer's corpus and coverage may take beside us."""
WATCHED = ["teegpu.wire", "teegpu.gpu", "teegpu.remote", "teegpu.model", "teegpu.api", "transports"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--target", help="this one alone")
    parser.add_argument("--input", type=Path, help="run it on this file, once")
    parser.add_argument("--engine", choices=("atheris", "random"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the server tells its log of every refusal
    if given.engine == "atheris":
        _atheris(given.target, given.seconds)
    if given.engine == "random":
        return _random(given.target, given.seconds)
    from tests.fuzz.targets import TARGETS

    if given.target is not None and given.target not in TARGETS:
        parser.error(f"targets are {', '.join(TARGETS)}")
    if given.input is not None:
        if given.target is None:
            parser.error("--input needs the --target that it was found by")
        print(TARGETS[given.target](given.input.read_bytes()))
        return 0
    return _all([given.target] if given.target else list(TARGETS), given.seconds)


def _all(names: list[str], seconds: float) -> int:
    """Runs the targets one after the other, each in a process of its own. 1 where one of them found something."""
    engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    share = seconds / len(names)
    how = "guided by coverage" if engine == "atheris" else "atheris is not installed: random damage, without coverage"
    print(f"fuzzing with {engine} ({how}), {share:.0f} s for each of {len(names)} targets", flush=True)
    failed = [name for name in names if not _one(name, engine, share)]
    if failed:
        print(f"found something in {', '.join(failed)}")
    return int(bool(failed))


def _one(name: str, engine: str, seconds: float) -> bool:
    folder = ROOT / name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "tests.fuzz", "--engine", engine, "--target", name, "--seconds", str(seconds)]
    with (folder / "log").open("w+") as log:
        # Many small products: threads would only wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        log.seek(0)
        lines = log.read().splitlines()
    found = re.findall(r"stat::number_of_executed_units: (\d+)", "\n".join(lines))
    executions = int(found[-1]) if found else 0
    kept = sorted(str(path) for path in set(folder.iterdir()) - before if path.name not in ("log", "corpus"))
    print(f"{name:12}  {executions:>10,} executions  {executions / seconds:>8,.0f}/s  {kept or 'nothing found'}")
    if code:
        print("\n".join(lines[-40:]))
        print(f"again: {sys.executable} -m tests.fuzz --target {name} --input {kept[0] if kept else '…'}", flush=True)
    return code == 0


def _atheris(name: str, seconds: float) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris
    import psutil

    with atheris.instrument_imports(include=WATCHED):
        from tests.fuzz.targets import TARGETS, seeds
    target, folder = TARGETS[name], ROOT / name
    for seed in seeds()[name]:
        (folder / "corpus" / hashlib.sha256(seed).hexdigest()[:24]).write_bytes(seed)
        target(seed)

    def once(data: bytes) -> None:
        target(data)

    most = psutil.Process().memory_info().rss // 2**20 + ATHERIS_GROWTH_MIB
    options = [f"-max_total_time={max(1, int(seconds))}", f"-artifact_prefix={folder}/", f"-rss_limit_mb={most}"]
    options += ["-timeout=10", "-max_len=20000", "-print_final_stats=1", "-len_control=0", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


def _random(name: str, seconds: float) -> int:
    import psutil

    from tests.fuzz.mutation import damaged
    from tests.fuzz.targets import TARGETS, seeds

    target, corpus = TARGETS[name], seeds()[name]
    number = random.SystemRandom().randrange(2**32)
    print(f"seed {number}")
    chance = random.Random(number)
    for seed in corpus:
        target(seed)
    process, before = psutil.Process(), 0
    ends = time.monotonic() + seconds
    executions = 0
    while time.monotonic() < ends:
        data = damaged(chance.choice(corpus), lambda most: chance.randint(0, most))
        try:
            target(data)
        except Exception:  # noqa: BLE001 (whatever it is, it is what we are here for)
            path = ROOT / name / f"crash-{hashlib.sha256(data).hexdigest()[:24]}"
            path.write_bytes(data)
            traceback.print_exc()
            return 1
        executions += 1
        if executions == 2000:
            before = process.memory_info().rss
        if executions % 1000 == 0 and before and process.memory_info().rss - before > GROWTH_BYTES:
            print(f"memory has grown by more than {GROWTH_BYTES >> 20} MiB since the first inputs")
            return 1
    print(f"stat::number_of_executed_units: {executions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A group of a fleet is killed under load: what fails, and how long until all is as before.

'teegpu fleet up' keeps groups on this machine; runners are threads here that follow its file and ask for one answer
again and again. In the middle one group is killed (SIGKILL). Exits with 9 where a bound does not hold.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Script, model_of, prompt_of
from teegpu import children, endpoints
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, TeegpuError, ThresholdError
from teegpu.model.folder import ModelFolder
from teegpu.runner import Runner
from teegpu.tee.sequence import Generation
from transports.base import Client

BACK_SECONDS = 10.0
FOLLOW_SECONDS = 2.0
BACK_SHARE = 0.9
"""Throughput is back when a window has this share of what there was."""

WINDOW_SECONDS = 3.0
PROMPT_TOKENS = 32
ANSWER_TOKENS = 16

_LOOK_SECONDS = 0.02
_UP_SECONDS = 180.0


class Fleet:
    """``teegpu fleet up`` with a state folder of its own. ``seen``: when each address was first in its file."""

    def __init__(self, folder: ModelFolder, replicas: int, root: Path) -> None:
        self.file = root / "endpoints.json"
        self.seen: dict[str, float] = {}
        self._replicas = replicas
        given = {name: value for name, value in os.environ.items() if not name.startswith("TEEGPU_")}
        self._environ = children.environment(given | {"XDG_STATE_HOME": str(root)})
        self._root = root
        own = ["--replicas", str(replicas), "--model", str(folder.path), "--threads", "1", "--dtype", "fp32"]
        self._process = self._begin("up", "--offline", *own, "--out", str(self.file), stdout=subprocess.DEVNULL)
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True, name="the file")
        self._watch.start()

    def _begin(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "teegpu", "fleet", *arguments]
        options = {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True} | options
        return subprocess.Popen(command, cwd=self._root, env=self._environ, **options)

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            for address in self.listed():
                self.seen.setdefault(address, time.perf_counter())

    def listed(self) -> list[str]:
        with contextlib.suppress(ConfigError):
            return [endpoint.address for endpoint in endpoints.parse_all([f"@{self.file}"])]
        return []

    def wait(self) -> None:
        """Until all groups are listed."""
        deadline = time.perf_counter() + _UP_SECONDS
        while len(self.listed()) < self._replicas:
            if self._process.poll() is not None or time.perf_counter() > deadline:
                raise TeegpuError("the fleet did not come up")
            time.sleep(_LOOK_SECONDS)

    def kill_one(self) -> str:
        """→ its address."""
        asked = self._begin("status", "--json", stdout=subprocess.PIPE)
        group = json.loads(asked.communicate()[0])["groups"][0]
        os.kill(group["pid"], signal.SIGKILL)
        return endpoints.parse(group["endpoint"]).address

    def close(self) -> None:
        self._over.set()
        self._watch.join()
        self._process.terminate()
        self._process.wait(_UP_SECONDS)


@dataclass
class Load:
    """What one runner did: when it had each token, what it answered, and when it first reached each server."""

    tokens: list[float] = field(default_factory=list)
    answers: set[tuple[int, ...]] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    reached: dict[str, float] = field(default_factory=dict)

    def connected(self, endpoint: Endpoint, client: Client) -> Client:
        self.reached.setdefault(endpoint.address, time.perf_counter())
        return client

    def run(self, settings: Config, folder: ModelFolder, over: Callable[[], bool]) -> None:
        def token(_: int) -> bool:
            self.tokens.append(time.perf_counter())
            return False

        with Runner(settings, folder, wrap=self.connected) as runner:
            prompt = prompt_of(runner, PROMPT_TOKENS)
            while not over():
                try:
                    done = runner.generate(
                        prompt, sampler=runner.sampler(), on_token=token, result=Generation(), ignore_end=True
                    )
                    self.answers.add(tuple(done.token_ids))
                except TeegpuError as error:
                    self.failures.append(str(error))
                runner.recorder.flush()


def rate(times: Sequence[float], begin: float, end: float) -> float:
    """Tokens a second; ``times`` are in order."""
    return (bisect.bisect(times, end) - bisect.bisect(times, begin)) / (end - begin)


def back(times: Sequence[float], killed: float, before: float) -> float:
    """Seconds until the end of the first window of no less than ``BACK_SHARE`` of ``before``, which all later ones of
    that length keep on average."""
    end = killed + WINDOW_SECONDS
    while end <= times[-1]:
        if min(rate(times, end - WINDOW_SECONDS, end), rate(times, end - WINDOW_SECONDS, times[-1])) >= (
            BACK_SHARE * before
        ):
            return end - killed
        end += 0.1
    return float("inf")


@contextlib.contextmanager
def loading(settings: Config, folder: ModelFolder, runners: int) -> Iterator[list[Load]]:
    over = threading.Event()
    loads = [Load() for _ in range(runners)]
    threads = [threading.Thread(target=load.run, args=(settings, folder, over.is_set)) for load in loads]
    for thread in threads:
        thread.start()
    try:
        while not all(load.answers for load in loads):
            if not any(thread.is_alive() for thread in threads):
                raise TeegpuError("the runners did not begin")
            time.sleep(_LOOK_SECONDS)
        yield loads
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--replicas", type=int, default=3)
    script.parser.add_argument("--runners", type=int, default=4)
    script.parser.add_argument("--seconds", type=float, default=20.0, help="before the kill, and after all are back")
    given = script.parse(arguments)
    with tempfile.TemporaryDirectory(prefix="teegpu-") as root:
        file = Path(root) / "endpoints.json"
        settings = script.settings(
            run__endpoints=(f"@{file}",), run__spread="least-loaded", run__prefill_plan="fused",
            run__decode_plan="fused", run__wire_dtype="fp32", run__threads=1, run__max_tokens=ANSWER_TOKENS,
            run__prefix_cache_mib=0,
        )  # fmt: skip
        folder = model_of(settings)
        with contextlib.closing(Fleet(folder, given.replicas, Path(root))) as fleet:
            fleet.wait()
            script.tell(f"{given.replicas} groups serve; {given.runners} runners begin")
            with loading(settings, folder, given.runners) as loads:
                began = time.perf_counter()
                time.sleep(given.seconds)
                old = set(fleet.seen)
                victim = fleet.kill_one()
                killed = time.perf_counter()
                script.tell(f"{victim} is killed")
                while not (new := set(fleet.seen) - old):
                    if time.perf_counter() - killed > _UP_SECONDS:
                        raise TeegpuError(f"no other group serves {_UP_SECONDS:g} s later")
                    time.sleep(_LOOK_SECONDS)
                address, listed = min(((each, fleet.seen[each]) for each in new), key=lambda found: found[1])
                time.sleep(given.seconds)
    if tell(script, loads, began, killed, listed, address, folder):
        sys.exit(ThresholdError.exit_code)


def tell(
    script: Script, loads: Sequence[Load], began: float, killed: float, listed: float, new: str, folder: ModelFolder
) -> list[str]:
    """→ the bounds that do not hold. ``new``: the address that was ``listed`` after the kill."""
    times = sorted(moment for load in loads for moment in load.tokens)
    before, meanwhile = rate(times, began, killed), rate(times, killed, listed)
    after = rate(times, listed + 1, times[-1])
    gaps = [later - earlier for load in loads for earlier, later in zip(load.tokens, load.tokens[1:], strict=False)
            if later > killed and earlier < listed]  # fmt: skip
    follow = [load.reached[new] - listed for load in loads if new in load.reached]
    failures = [failure for load in loads for failure in load.failures]
    answers = {answer for load in loads for answer in load.answers}
    result: dict[str, Any] = {
        "failed": len(failures),
        "answers": sum(len(load.tokens) for load in loads) // ANSWER_TOKENS,
        "different_answers": len(answers) - 1,
        "tokens_per_second": {"before": before, "without": meanwhile, "after": after},
        "listed_seconds": listed - killed,
        "back_seconds": back(times, killed, before),
        "longest_gap_seconds": max(gaps, default=0.0),
        "follow_seconds": follow,
        "tokens_of_runners": [len(load.tokens) for load in loads],
    }
    rows = [
        ["", "measured", "bound"],
        ["requests that failed", f"{len(failures)} of {result['answers']}", "0"],
        ["answers that differ", f"{result['different_answers']}", "0"],
        ["tokens/s before", f"{before:.1f}", ""],
        ["tokens/s until another serves", f"{meanwhile:.1f}", ""],
        ["tokens/s after", f"{after:.1f}", ""],
        ["another serves after", f"{listed - killed:.1f} s", ""],
        ["throughput is back after", f"{result['back_seconds']:.1f} s", f"{BACK_SECONDS:g} s"],
        ["longest wait of a runner for a token", f"{max(gaps, default=0.0):.2f} s", ""],
        ["runners reach it after it is listed", f"{max(follow, default=0.0):.2f} s at most", f"{FOLLOW_SECONDS:g} s"],
    ]  # fmt: skip
    found = [
        *(["requests failed"] if failures else []),
        *(["answers differ"] if len(answers) > 1 else []),
        *(["throughput was back too late"] if result["back_seconds"] > BACK_SECONDS else []),
        *(["the file was followed too late"] if len(follow) < len(loads) or max(follow) > FOLLOW_SECONDS else []),
    ]
    notes = [
        f"tokens of each runner: {', '.join(str(len(load.tokens)) for load in loads)}",
        *sorted(set(failures)),
        *(f"over its bound: {each}" for each in found),
    ]
    script.finish(rows, notes, [result], folder=folder)
    return found


if __name__ == "__main__":
    main()

"""The house rules that imports can break: who may know whom, and what the command line may not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TinyModel

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    {"__main__"},
    {"cli"},
    {"connect"},
    {"monitor", "api", "fleet"},
    {"audit", "bench", "report"},
    {"runner"},
    {"shield"},
    {"tee", "gpu"},
    {"remote"},
    {"options"},
    {"keys"},
    {"stats"},
    {"wire", "model", "record", "attest", "transports"},
    {
        *("blocks", "children", "config", "endpoints", "errors", "facts", "fields", "files", "formats"),
        *("kernels", "machine", "operators", "ring", "ringkernels", "ringtriton", "settings", "text", "torchload"),
        "units",
    },
)
"""From the top of the house down. A part imports from below itself, never from beside or above."""

OUTSIDE = {"benchmarks", "tests"}
"""What lies beside the packages and is not installed with them: they import nothing of it."""

HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "gguf",
    "zmq",
    "numpy",
    "textual",
    "starlette",
    "uvicorn",
    "ray",
}


def level(part: str) -> int:
    for depth, parts in enumerate(LAYERS):
        if part in parts:
            return depth
    raise ValueError(f"{part!r} has no place in LAYERS")


def part_of(module: str) -> str | None:
    """``teegpu.wire.codec`` → ``wire``; ``transports.zeromq`` → ``transports``; anything foreign → None."""
    first, _, rest = module.partition(".")
    if first == "transports":
        return first
    return rest.partition(".")[0] or None if first == "teegpu" else None


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(source: str, module: str, *, package: bool) -> Iterator[str]:
    """Every module that ``source`` imports, wherever in it, absolute; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + package]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def breaches(source: str, module: str, *, package: bool = False) -> list[str]:
    """The imports in ``source`` (of ``module``) that the order of the house does not allow."""
    own = part_of(module)
    found = []
    for target in imported(source, module, package=package):
        other = part_of(target)
        if target.partition(".")[0] in OUTSIDE:
            allowed = False
        elif own == "transports":
            allowed = not target.startswith("teegpu")
        elif own is None or other is None or other == "__version__" or own == other:
            allowed = True
        elif level(own) == len(LAYERS) - 1:
            allowed = level(other) == level(own)
        else:
            allowed = level(other) > level(own)
        if not allowed:
            found.append(f"{module} imports {target}")
    return found


def sources() -> list[Path]:
    return sorted([*(ROOT / "teegpu").rglob("*.py"), *(ROOT / "transports").rglob("*.py")])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("teegpu.tee.decoder", "from teegpu.gpu import server"),
        ("teegpu.tee.decoder", "def f():\n    import teegpu.gpu.executor"),
        ("teegpu.gpu.server", "from teegpu.tee.sampling import sample"),
        ("teegpu.gpu.server", "from ..tee import sampling"),
        ("teegpu.wire.codec", "from teegpu import tee"),
        ("teegpu.model.spec", "from teegpu.cli.main import app"),
        ("teegpu.report.tables", "import teegpu.bench.ladder"),
        ("teegpu.cli.bench", "from benchmarks import rpc"),
        ("teegpu.config", "from teegpu.wire.limits import Limits"),
        ("transports.zeromq", "from teegpu.errors import TeegpuError"),
        ("transports.zeromq", "import teegpu"),
    ],
)
def test_a_breach_is_seen(module: str, line: str) -> None:
    assert len(breaches(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("teegpu.cli.run", "from teegpu.gpu.server import Server\nfrom teegpu.tee import generate"),
        ("teegpu.remote.client", "import transports\nfrom teegpu.wire.codec import encode\nfrom . import pool"),
        ("teegpu.config", "from teegpu.errors import ConfigError\nfrom teegpu import settings"),
        ("teegpu.gpu.server", "from teegpu import __version__\nimport torch"),
        ("transports.zeromq", "import zmq\nfrom .base import Client"),
    ],
)
def test_what_points_down_is_allowed(module: str, line: str) -> None:
    assert breaches(line, module) == []


def test_imports_point_down_only() -> None:
    found = [
        breach
        for path in sources()
        for breach in breaches(path.read_text("utf-8"), module_name(path), package=path.name == "__init__.py")
    ]
    assert found == []


def test_every_part_has_its_place_in_the_house() -> None:
    parts = {part_of(module_name(path)) for path in sources()} - {None}
    assert parts <= set().union(*LAYERS)


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    report = (
        "\nimport json, sys\nsys.stderr.write(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_after("from teegpu.cli.main import run\nassert run(['--help']) == 0")


def test_the_help_of_commands_loads_nothing_heavy() -> None:
    code = (
        "from teegpu.cli.main import COMMANDS, run\nfor name in COMMANDS:\n    assert run([name, '--help']) == 0, name"
    )
    assert not HEAVY & loaded_after(code)


@pytest.mark.parametrize(
    "args",
    [
        ["--link", "rtt=5parsecs"],
        ["--endpoint", "tcp://a:5555#layres=0-9"],
        ["--endpoint", "tcp://a:5555", "--server-key", "nobody", "--client-key", "me"],
        ["--privacy", "two-server", "--plan", "fused"],
        ["--privacy", "two-server", "--endpoint", "tcp://a:5555"],
        ["--require-privacy", "pads"],
    ],
)
def test_a_run_that_can_not_be_is_refused_before_anything_heavy_is_loaded(args: list[str]) -> None:
    code = f"from teegpu.cli.main import run\nassert run(['run', *{args!r}, 'Hi']) in (2, 10)"
    assert not (HEAVY - {"zmq"}) & loaded_after(code)


def test_a_server_of_the_run_is_begun_before_the_runner_loads_torch() -> None:
    """So that both load it at once."""
    assert not (HEAVY - {"zmq"}) & loaded_after("from teegpu.remote.servers import Servers\nimport teegpu.shield.modes")


def test_a_server_whose_port_is_taken_says_so_before_it_loads_torch(tiny_model: TinyModel) -> None:
    code = (
        "import socket\nfrom teegpu.cli.main import run\n"
        "with socket.create_server(('127.0.0.1', 0)) as taken:\n"
        "    bind = f'tcp://127.0.0.1:{taken.getsockname()[1]}'\n"
        f"    assert run(['serve', '--model', {str(tiny_model('llama').path)!r}, '--bind', bind]) == 2"
    )
    assert not (HEAVY - {"zmq"}) & loaded_after(code)


def test_importing_transports_loads_no_zmq() -> None:
    assert not HEAVY & loaded_after("import transports\ntransports.names()")


def test_heavy_modules_would_be_seen() -> None:
    assert "numpy" in loaded_after("import numpy")


@pytest.mark.alone
def test_help_is_quick() -> None:
    """In 0.3 s; on a machine where typer and rich take that long to load by themselves, little longer than these."""
    script = Path(sys.executable).with_name("teegpu")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "teegpu"]
    libraries = min(seconds_of([sys.executable, "-c", "import typer, typer.rich_utils"]) for _ in range(5))
    assert min(seconds_of([*command, "--help"]) for _ in range(5)) < max(0.3, 1.4 * libraries)


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start

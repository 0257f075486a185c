"""The systemd units in the documentation are ones that systemd takes; the image has all that it copies, and that
starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNITS = {
    name: text
    for page in sorted((ROOT / "docs").glob("*.md"))
    for name, text in re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    # What it starts need not be installed here.
    (tmp_path / name).write_text(UNITS[name].replace("/opt/teegpu/bin/teegpu", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    told = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, told) == (0, [])


def test_both_sides_have_a_unit() -> None:
    assert set(UNITS) == {"teegpu.service", "teegpu-api.service"}


LINES = (ROOT / "Containerfile").read_text("utf-8").splitlines()


def test_what_the_image_copies_is_a_package_that_starts(tmp_path: Path) -> None:
    """Nothing else of the checkout is in it, and the program is what its entry point names."""
    for line in LINES:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
    with (tmp_path / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    for name in (project["project"]["readme"], *project["project"]["license-files"], "constraints.txt"):
        assert (tmp_path / name).is_file(), name
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in LINES if line.startswith("ENTRYPOINT ")]
    (arguments,) = [json.loads(line.removeprefix("CMD ")) for line in LINES if line.startswith("CMD ")]
    module, _, function = project["project"]["scripts"][entry[0]].partition(":")
    code = f"import sys, {module} as m; assert m.__file__.startswith(sys.argv.pop(1)), m.__file__; m.{function}()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path), *entry[1:], *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout


def test_the_image_is_built_and_ended_as_the_page_says() -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    arguments = {line.split()[1].partition("=")[0] for line in LINES if line.startswith("ARG ")}
    assert set(re.findall(r"--build-arg (\w+)=", page)) <= arguments
    # It does not run as root, and is told to end as both sides expect.
    users = [found[1] for line in LINES if (found := re.search(r"useradd --uid (\d+)", line))]
    assert f"The user is {users[0]}" in page
    assert "USER teegpu" in LINES
    assert "STOPSIGNAL SIGTERM" in LINES

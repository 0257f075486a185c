"""The systemd units in the documentation are ones that systemd takes, and the image has all that it copies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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


def test_the_image_copies_what_there_is() -> None:
    lines = (ROOT / "Containerfile").read_text("utf-8").splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
    # It does not run as root, and is told to end as both sides expect.
    assert "USER teegpu" in lines
    assert "STOPSIGNAL SIGTERM" in lines

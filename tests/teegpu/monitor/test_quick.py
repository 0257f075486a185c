"""A watcher starts quickly: it loads nothing of what a run computes with."""

from __future__ import annotations

import subprocess
import sys


def test_the_monitor_loads_no_torch_and_no_zmq() -> None:
    code = (
        "import sys, teegpu.cli.watch, teegpu.cli.watching, teegpu.monitor.app\n"
        "import teegpu.record.store, teegpu.report.tables, teegpu.report.advice\n"
        "print(sorted({'torch', 'zmq', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Torch's library, loaded where a signal is heard."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from teegpu import torchload

LOADS = """
import sys
from pathlib import Path
from teegpu import torchload

with torchload.importing():
    assert "libtorch_cpu.so" in Path("/proc/self/maps").read_text()
    assert not {"torch", "numpy"} & set(sys.modules)
    import torch
print(torch.ones(2, 3).sum().item())
"""


def test_the_library_is_there_before_torch_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("6.0\n", "")


def test_a_signal_is_heard_while_the_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()
    monkeypatch.setattr(torchload, "_load_library", lambda: loaded.wait(60))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), torchload.importing():
        pytest.fail("it did not wait")
    loaded.set()

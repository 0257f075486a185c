"""Where a model lies on disk, and where teegpu keeps the models that it fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``config.json``, a tokenizer and safetensors weights.

    ``name`` is for messages and records. ``pull_as`` is what to give to ``teegpu model pull`` to make the folder anew,
    where teegpu made it; empty where the folder is the user's own.
    """

    name: str
    path: Path
    pull_as: str = ""

    @property
    def repair(self) -> str:
        """What to do when a file of this model is damaged or missing, as the end of an error message."""
        if self.pull_as:
            return f"fetch the model again with 'teegpu model pull {self.pull_as} --force'"
        return f"restore the file in {self.path}, or choose another model with --model"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/teegpu``, or ``~/.cache/teegpu`` where that is unset, empty or relative (as XDG asks)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "teegpu"

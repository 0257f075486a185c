"""Finding the configured model, with its progress shown: what ``run`` and ``serve`` share."""

from __future__ import annotations

from teegpu.cli.progress import shown
from teegpu.config import Config
from teegpu.model.folder import ModelFolder


def find_model(config: Config, *, quiet: bool = False) -> ModelFolder:
    """The folder of ``model.name``, fetched and converted first where it is not there. Raises ``ModelError``."""
    from teegpu.model import catalog

    model = config.model
    with shown(quiet=quiet) as progress:
        return catalog.resolve(model.name, cache_dir=model.cache_path, offline=model.offline, progress=progress)

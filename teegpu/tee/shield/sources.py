"""The masks of a run: what ``run.privacy`` and the settings of [shield] mean, put together."""

from __future__ import annotations

from collections.abc import Callable

from teegpu.config import Config
from teegpu.errors import ShieldError
from teegpu.model.spec import ModelSpec
from teegpu.tee.shield import sealed
from teegpu.tee.shield.lwe import LweSource, load_hints
from teegpu.tee.shield.masks import MaskSource
from teegpu.tee.shield.pads import PadSource
from teegpu.tee.shield.padstore import Pool, pool_folder


def open_source(
    mode: str,
    config: Config,
    spec: ModelSpec,
    digest: str,
    *,
    notify: Callable[[str], None] = lambda _: None,
) -> MaskSource:
    """The source of masks for ``mode``, of the model with ``digest``. Close it.

    Raises ``ShieldError`` where there are no pads, or files that can't be used, and ``ValueError`` for a mode without
    masks.
    """
    data = sealed.data_folder(config.shield.dir)
    key = sealed.SealKey.load()
    if mode == "pads":
        try:
            pool = Pool(pool_folder(data, digest), digest, spec, key, notify)
        except FileNotFoundError:
            raise ShieldError(
                f"run.privacy is pads, and there are none for this model in {data}: make some with 'teegpu pads make "
                "--tokens N' (as many as prompt and answer have)"
            ) from None
        return PadSource(pool, when_exhausted=config.shield.when_exhausted, notify=notify)
    if mode == "lwe":
        notify("the mode lwe is experimental: nobody outside of this project has reviewed it")
        return LweSource(digest, spec, load_hints(spec, digest, data))
    raise ValueError(f"the mode {mode} has no masks")

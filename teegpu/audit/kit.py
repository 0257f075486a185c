"""What a private or verified run needs, made for an audit alone and destroyed after it.

An audit spends pads by the hundred, and each lie that is noticed throws the keys of verification away. So it leaves the
user's alone and makes its own, in a folder beside them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from teegpu.config import Config
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import lwe, modes, padstore, sealed
from teegpu.tee.shield.padmaker import PadMaker

Notify = Callable[[str], None]


@contextlib.contextmanager
def kit(config: Config, folder: ModelFolder, tokens: int, heads: int, notify: Notify) -> Iterator[Config]:
    """``config`` with a ``shield.dir`` that is its own, with pads for ``tokens`` tokens and the logits of ``heads``, or
    with hints, where the mode takes them. Raises ``ShieldError`` and ``ModelError``."""
    if not (modes.shielded(config) or modes.verified(config)):
        yield config
        return
    data = sealed.data_folder(config.shield.dir)
    with sealed.explaining(data):
        own = Path(tempfile.mkdtemp(prefix="audit-", dir=data))
    try:
        with contextlib.ExitStack() as stack:
            if config.run.privacy in (modes.PADS, modes.LWE):
                spec = read_spec(folder)
                store = stack.enter_context(WeightStore(folder, spec))
                if config.run.privacy == modes.PADS:
                    notify(f"making pads for {tokens:,} tokens, for this audit alone")
                    _pads(stack, store, spec, own, folder.name, tokens, heads)
                else:
                    _hints(store, spec, data, own, notify)
            yield replace(config, shield=replace(config.shield, dir=str(own)))
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _pads(
    stack: contextlib.ExitStack,
    store: WeightStore,
    spec: ModelSpec,
    own: Path,
    name: str,
    tokens: int,
    heads: int,
) -> None:
    digest = store.digest()
    # With the pool goes its ledger, which lies elsewhere.
    stack.callback(_destroy, padstore.pool_folder(own, digest))
    PadMaker(store, spec, digest, own, name).run(tokens, heads, lambda *_: None)


def _destroy(pool: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        padstore.destroy(pool, sealed.SealKey.load())


def _hints(store: WeightStore, spec: ModelSpec, data: Path, own: Path, notify: Notify) -> None:
    """The user's where there are some: they are no secret, follow from the weights, and take long to make."""
    digest = store.digest()
    known = lwe.hint_path(data, digest)
    try:
        os.link(known, lwe.hint_path(own, digest))
    except OSError:
        notify("making hints, for this audit alone ('teegpu hint make' makes them once for all)")
        lwe.make_hints(store, spec, digest, own)

"""Puts together what a private or verified run needs around its connections, and says afterwards what it was.

The runner asks it for what differs from a plain run: which servers go together, who greets them, and what stands in the
place of the client. A plain run has none of it. All that is secret in it (masks, pads, check vectors) lives in this
process's memory, and is gone with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from teegpu import facts
from teegpu.config import Config
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.options import verified
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Products
from teegpu.remote.connections import Handshake
from teegpu.remote.handshake import ModelHandshake
from teegpu.remote.sides import ApartHandshake, Instances
from teegpu.ring import RingMatrix
from teegpu.shield.answers import NamingClient
from teegpu.shield.exchanges import Masked, TwoServers, Unmasked
from teegpu.shield.freivalds import Checks
from teegpu.shield.pads import Notify as Show
from teegpu.shield.pads import Offline, Pads
from teegpu.shield.products import Exchange, Reference, ShieldedProducts
from teegpu.shield.quantised import Linear, Measures, Reader, quantised, read
from teegpu.wire.codec import Decoder as WireDecoder

Notify = Callable[[str], None]


class Shield:
    """The shield of one run, on the model in ``store`` with ``digest``. ``close`` it when it is over; that may be done
    twice.

    Reads all weights once. ``notify`` gets in a line what takes time. Raises ``ModelError``.
    """

    def __init__(
        self,
        config: Config,
        store: WeightStore,
        spec: ModelSpec,
        digest: str,
        *,
        recorder: Recorder,
        notify: Notify,
    ) -> None:
        self.mode = facts.privacy(config.run.privacy)
        self.verified = verified(config)
        self._store = store
        self._spec = spec
        self._digest = digest
        self._recorder = recorder
        self._notify = notify
        self._instances = Instances()
        self._measures = Measures(spec)
        self._checks = Checks(config.shield.checks, self._read) if self.verified else None
        self._reference = None if self.mode.servers else Reference(store, spec, recorder)
        self._pads = Pads(store, spec) if self.mode.pads else None
        wanting = (self._measures, self._checks, self._reference)
        self._read(*(one.add for one in wanting if one is not None))

    def _read(self, *readers: Reader) -> None:
        told = False

        def progress(share: float) -> None:
            nonlocal told
            if not told and share < 1.0:
                told = True
                self._notify("reading the model's weights as whole numbers")

        with torch.inference_mode():
            read(self._store, self._spec, readers, progress=progress)

    def close(self) -> None:
        if self._pads is not None:
            self._pads.close()

    def prepare(self, tokens: int, logits: int, show: Show) -> None:
        """Makes the pads that are missing for a prompt and its answer: for the layers of ``tokens`` tokens, and for
        lm_head of ``logits``. Nothing where the mode takes none. Raises ``ShieldError`` and ``ModelError``."""
        if self._pads is not None:
            self._pads.make(tokens, logits, show)

    @property
    def offline(self) -> Offline | None:
        """What was made ahead, and what it cost; None for a mode in which nothing is."""
        return None if self._pads is None else self._pads.offline

    def handshake(self, decoder: WireDecoder, share: int) -> Handshake:
        """Who greets the servers that get ``share``."""
        own = ModelHandshake(decoder, self._spec, self._digest, self._measures.server_digest)
        return ApartHandshake(own, share, self._instances)

    def products(self, clients: Sequence[NamingClient]) -> Products:
        """What runs the decoder's programs over ``clients``: one for each share, one where there are none, and none for
        ``reference``."""
        return ShieldedProducts(self._measures, self._exchange(clients), self._recorder)

    def _exchange(self, clients: Sequence[NamingClient]) -> Exchange:
        record, checks = self._recorder, self._checks
        if self._reference is not None:
            return self._reference
        if self.mode.servers == 2:
            return TwoServers(clients[0], clients[1], record, checks, self._recomputed)
        if self._pads is not None:
            return Masked(self._pads, clients[0], record, checks)
        if self.mode.hides:
            raise RuntimeError(f"nothing here hides values as {self.mode.name} does")
        return Unmasked(clients[0], record, checks)

    def _recomputed(self, linear: Linear, values: torch.Tensor) -> torch.Tensor:
        return RingMatrix(quantised(self._store, self._spec, linear)[0]).product(values)

"""Puts together what a private or verified run needs around its connections, and says afterwards what it was.

The runner asks it for what differs from a plain run: which servers go together, who greets them, and what stands in the
place of the client. A plain run has none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from teegpu.config import Config
from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.ring import RingMatrix
from teegpu.tee.connections import Greets
from teegpu.tee.greeting import Greeter
from teegpu.tee.products import Products
from teegpu.tee.shield import modes, sealed
from teegpu.tee.shield.answers import NamingClient
from teegpu.tee.shield.exchanges import Check, Masked, TwoServers
from teegpu.tee.shield.facts import FactTable, Product, quantised
from teegpu.tee.shield.facts import products as all_products
from teegpu.tee.shield.masks import MaskSource
from teegpu.tee.shield.plainproducts import VerifiedProducts
from teegpu.tee.shield.plainverify import ROUNDOFF, PlainKeys
from teegpu.tee.shield.products import Exchange, Reference, ShieldedProducts
from teegpu.tee.shield.refill import Refill
from teegpu.tee.shield.sides import ApartGreeter, Instances
from teegpu.tee.shield.sources import open_source
from teegpu.tee.shield.verify import Keys
from teegpu.tee.shield.wholeverify import WholeKeys
from teegpu.tee.weights import TeeWeights
from teegpu.wire.codec import Decoder as WireDecoder

Notify = Callable[[str], None]


def keys_for(mode: str) -> type[Keys | WholeKeys]:
    """What the products of a private ``mode`` are checked with: with noise in them, as they were sent, masked."""
    return Keys if mode == modes.LWE else WholeKeys


class Shield:
    """The shield of one run, on the model in ``store`` with ``digest``. ``close`` it when it is over; that may be done
    twice.

    ``notify`` is told in a line what takes time. Raises ``ModelError``, and ``ShieldError`` where files that it needs
    are not there or can't be used.
    """

    def __init__(
        self,
        config: Config,
        store: WeightStore,
        spec: ModelSpec,
        digest: str,
        *,
        weights: TeeWeights,
        recorder: Recorder,
        notify: Notify,
    ) -> None:
        self.mode = config.run.privacy
        self.verified = modes.verified(config)
        self._config = config
        self._store = store
        self._spec = spec
        self._digest = digest
        self._weights = weights
        self._recorder = recorder
        self._notify = notify
        self._instances = Instances()
        self._closing = contextlib.ExitStack()
        self.facts: FactTable | None = None
        if self.mode != modes.NONE:
            telling = self._telling("measuring the model's weights")
            self.facts = FactTable.load(store, spec, digest, cache_dir=config.model.cache_path, progress=telling)
        self._source: MaskSource | None = None
        if self.mode in (modes.PADS, modes.LWE):
            # Now, and not once servers have answered: what is missing is told of at once.
            self._source = open_source(self.mode, config, spec, digest, notify=notify)
            self._closing.callback(self._source.close)

    def close(self) -> None:
        self._closing.close()

    def greeter(self, decoder: WireDecoder, share: int) -> Greets:
        """Who greets the servers that get ``share``."""
        ring_digest = None if self.facts is None else self.facts.server_digest
        return ApartGreeter(Greeter(decoder, self._spec, self._digest, ring_digest), share, self._instances)

    def products(self, clients: Sequence[NamingClient], server_dtypes: Callable[[], Sequence[str]]) -> Products:
        """What runs the decoder's programs over ``clients``: one for each share, one where there are none, and none for
        ``reference``. ``server_dtypes``: in what the servers compute."""
        if self.facts is None:
            return self._plain(clients[0], server_dtypes)
        return ShieldedProducts(self.facts, self._exchange(clients), self._recorder)

    def _exchange(self, clients: Sequence[NamingClient]) -> Exchange:
        record = self._recorder
        if self.mode == modes.REFERENCE:
            reference = Reference(self._store, self._spec, record)
            reference.preload(all_products(self._spec))
            return reference
        keys = self._keys() if self.verified else None
        if self.mode == modes.TWO_SERVER:
            return TwoServers(clients[0], clients[1], record, keys, self._recomputed)
        if self._source is None:
            raise RuntimeError(f"the mode {self.mode} has no masks")
        if self.mode == modes.PADS and self._config.shield.refill_tokens:
            self._closing.enter_context(Refill(self._store.folder, self._config, self._notify))
        return Masked(self._source, clients[0], record, keys)

    def _recomputed(self, product: Product, values: torch.Tensor) -> torch.Tensor:
        return RingMatrix(quantised(self._store, self._spec, product)[0]).product(values)

    def _keys(self) -> Check:
        return keys_for(self.mode).load(
            self._store,
            self._spec,
            self._digest,
            checks=self._config.shield.checks,
            folder=sealed.data_folder(self._config.shield.dir),
            progress=self._telling("making keys of verification"),
            notify=self._notify,
        )

    def _plain(self, client: NamingClient, server_dtypes: Callable[[], Sequence[str]]) -> VerifiedProducts:
        keys = PlainKeys.load(
            self._store,
            self._spec,
            self._digest,
            checks=self._config.shield.checks,
            folder=sealed.data_folder(self._config.shield.dir),
            progress=self._telling("making keys of verification"),
            notify=self._notify,
        )

        def least_precise() -> str:
            return max(server_dtypes(), key=lambda name: ROUNDOFF.get(name, 0.0), default="fp32")

        return VerifiedProducts(client, keys, self._weights, self._recorder, least_precise)

    def _telling(self, what: str) -> Callable[[float], None]:
        """Tells once that ``what`` goes on, where it is not done at its first step."""
        told = False

        def progress(share: float) -> None:
            nonlocal told
            if not told and share < 1.0:
                told = True
                self._notify(f"{what}, once for this model and these settings")

        return progress

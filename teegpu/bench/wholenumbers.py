"""Products as private runs compute them, here and without servers: for what their arithmetic does to the logits.

``two-server`` and ``pads`` give the bits of ``reference``; the tests hold them to that. ``lwe`` gives those of an input
to which a Gaussian error was added, which is what is left of its masks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee.products import Products
from teegpu.tee.shield.facts import FactTable
from teegpu.tee.shield.modes import LWE, REFERENCE
from teegpu.tee.shield.products import Asked, Exchange, Reference, ShieldedProducts
from teegpu.tee.shield.samplers import SIGMA, Stream, gaussian

PLAN = "attention"
"""The plan of private runs."""

MODES = {REFERENCE: "whole numbers (two-server, pads)", LWE: "whole numbers with noise (lwe)"}
"""The modes whose results differ, and what they are called in results."""


class WholeNumbers:
    """Makes ``Products`` for a mode of ``MODES``, of the model in ``store``. Its int8 weights are made once, and
    shared; what was measured of them is kept in ``cache_dir``."""

    def __init__(self, store: WeightStore, spec: ModelSpec, digest: str, cache_dir: Path | None) -> None:
        self._facts = FactTable.load(store, spec, digest, cache_dir=cache_dir)
        self._recorder = Recorder()
        self._exact = Reference(store, spec, self._recorder)

    def products(self, mode: str) -> Products:
        exchange: Exchange = self._exact if mode == REFERENCE else _Noisy(self._exact)
        return ShieldedProducts(self._facts, exchange, self._recorder)


class _Noisy:
    """``exact``, of an input with the errors that the mode ``lwe`` draws."""

    noise = SIGMA

    def __init__(self, exact: Reference) -> None:
        self._exact = exact

    async def product(self, asked: Asked) -> torch.Tensor:
        asked.whole.add_(gaussian(Stream(), *asked.whole.shape))
        return await self._exact.product(asked)

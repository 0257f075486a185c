"""Products as private and verified runs compute them, here and without servers: for what their arithmetic does to the
logits. All modes give the bits of ``reference``; the tests hold them to that.
"""

from __future__ import annotations

from typing import Final

from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Products
from teegpu.shield.products import Reference, ShieldedProducts
from teegpu.shield.quantised import Measures, read

PLAN: Final = "attention"
"""The plan of runs in whole numbers."""

LABEL: Final = "whole numbers (private, verified)"
"""What they are called in results."""


def products(store: WeightStore, spec: ModelSpec) -> Products:
    """Of the model in ``store``, whose int8 weights are kept. Raises ``ModelError``."""
    recorder = Recorder()
    measures, reference = Measures(spec), Reference(store, spec, recorder)
    read(store, spec, [measures.add, reference.add])
    return ShieldedProducts(measures, reference, recorder)

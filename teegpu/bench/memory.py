"""How much memory more processes may take, and how much one of a benchmark's will need."""

from __future__ import annotations

from teegpu.machine import available_bytes
from teegpu.model.spec import ModelSpec

__all__ = ["available_bytes", "case_bytes", "server_bytes"]

MIB = 2**20

PROCESS_BYTES = 700 * MIB
"""A process with torch loaded, and the activations of a prompt."""

_LARGEST_VALUE_BYTES = {"bf16": 2, "fp16": 2}


def server_bytes(spec: ModelSpec, dtype: str, *, int8: bool = False) -> int:
    """What a GPU server on the CPU needs for ``spec`` in ``dtype``; ``auto`` may turn out to be the largest. ``int8``:
    it also has the weights for shielded products."""
    return PROCESS_BYTES + spec.parameters * (_LARGEST_VALUE_BYTES.get(dtype, 4) + int8)


def case_bytes(spec: ModelSpec, *, all_weights: bool, dtype: str = "fp32") -> int:
    """What a case's process needs: all weights in ``dtype``, or the embedding alone."""
    if all_weights:
        return PROCESS_BYTES + spec.parameters * _LARGEST_VALUE_BYTES.get(dtype, 4)
    return PROCESS_BYTES + spec.vocab_size * spec.hidden_size * 4

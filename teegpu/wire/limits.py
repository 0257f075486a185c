"""What a peer may ask of us. Every bound is checked before anything is allocated; each has its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one message, on either side.

    ``message_bytes``: the sum of a message's frames; the scores of a per-op prefill of 4,096 tokens over 32 heads take
    2 GiB in fp32.
    ``tensors``: tensors in a message; the largest program of ours has 2 inputs and 2 outputs.
    ``dimension``: one dimension of a tensor; vocabularies end near 2**18, positions near 2**20.
    ``program_steps``: steps of a program; the fused plan's longest has 4.
    ``working_bytes``: memory that one program may need for its inputs, all its registers and its reply.
    ``program_macs``: multiplications of one program, each with its addition; 0: as many as suit the server's device.
    """

    message_bytes: int = 2 * 2**30
    tensors: int = 32
    dimension: int = 2**24
    program_steps: int = 64
    working_bytes: int = 8 * 2**30
    program_macs: int = 0


MAX_HEADER_BYTES = 256 * 1024
"""A header of the largest program and tensor table is below 8 KiB; msgpack gets no more than this to parse."""

REMEMBERED = 2048
"""Checked programs, tensor tables and compiled programs that a side keeps. A model needs a few hundred of each."""

REMEMBERED_STEPS = 16
REMEMBERED_TENSORS = 8
REMEMBERED_BYTES = 1024
"""The longest program and tensor table that are kept (ours have 4 steps, 2 tensors and 400 bytes at most), so that a
peer that invents them gets some tens of MiB of memory, not gigabytes."""

MAX_STEP_WEIGHTS = 8
"""Weights whose products a step puts side by side; ours have 3 at most: Q, K and V."""

MAX_DIMS = 4
MAX_NAME_LENGTH = 64
MAX_TEXT_LENGTH = 2048
"""Longest free text in a message: that of a refusal, which is for people."""
MAX_LABEL_LENGTH = 256
"""Longest text that a peer says of itself: version, model, device. It stands in a line of a report."""

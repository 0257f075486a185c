"""msgpack from a peer, with bounds: plain values only, and none that takes much more memory than its bytes."""

from __future__ import annotations

from typing import Final

import msgpack

from teegpu.errors import WireError

MAX_ITEMS: Final = 4096
"""Items of one list or map. A list is allocated by the length that it declares, before its items are read, so nested
ones could otherwise ask for hundreds of times their bytes."""


def unpack(packed: bytes | memoryview, what: str) -> object:
    """The value in ``packed``: None, bool, int, float, str, bytes, and lists and maps of these.

    Raises ``WireError``, which calls the value ``what``, for anything else: extension types and timestamps, text that
    is not UTF-8, keys that are not strings, nesting beyond msgpack's own stack, bytes that are missing or left over.
    """
    try:
        value: object = msgpack.unpackb(
            packed,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"{what} is not valid msgpack") from error
    return value


def _refuse_extension(code: int, _: bytes) -> object:
    raise ValueError(f"extension type {code} is none of ours")

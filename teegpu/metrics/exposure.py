"""What a wait was for: the server's claims, held against what the runner saw, laid over the wait."""

from __future__ import annotations

from teegpu.metrics.events import Lap, Rpc


def server_parts(rpc: Rpc) -> tuple[float, float, float, float]:
    """(queue, decode, compute, encode) seconds as the server claims them, scaled down where they exceed the round trip:
    the server is not trusted, and its clock is not ours."""
    parts = (rpc.queue_seconds, rpc.decode_seconds, rpc.compute_seconds, rpc.encode_seconds)
    claimed = sum(parts)
    round_trip = max(0.0, (rpc.received_ns - rpc.sent_ns) / 1e9)
    if claimed <= round_trip:
        return parts
    scale = round_trip / claimed
    return parts[0] * scale, parts[1] * scale, parts[2] * scale, parts[3] * scale


def exposed(lap: Lap, rpc: Rpc) -> tuple[float, float]:
    """How much of a wait fell on the server's (queue + serialization, computation) for the request that ended it.

    The request's time is laid out as link up, queue, decode, compute, encode, link down; the two link parts share what
    the server did not claim in proportion to their bytes, since the clocks of the two sides are not compared. The wait
    is then intersected with that line. A lock-step wait covers all of it, an overlapped one only its end.
    """
    queue, decode, compute, encode = server_parts(rpc)
    network = (rpc.received_ns - rpc.sent_ns) / 1e9 - (queue + decode + compute + encode)
    nbytes = rpc.bytes_up + rpc.bytes_down
    at = network * (rpc.bytes_up / nbytes if nbytes else 0.5)
    waited_from = (lap.start_ns - rpc.sent_ns) / 1e9
    waited_to = (lap.end_ns - rpc.sent_ns) / 1e9
    server = gpu = 0.0
    for seconds, is_gpu in ((queue, False), (decode, False), (compute, True), (encode, False)):
        overlap = max(0.0, min(at + seconds, waited_to) - max(at, waited_from))
        at += seconds
        if is_gpu:
            gpu += overlap
        else:
            server += overlap
    return server, gpu

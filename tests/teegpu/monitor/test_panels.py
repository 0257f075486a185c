"""What the panels say, letter by letter: a made-up run in the middle of decode, and one in its prefill."""

from __future__ import annotations

import textwrap

import pytest

from teegpu.monitor.draw import Line, Look, plain
from teegpu.monitor.panels import communication, layers, ops, overview, text
from teegpu.monitor.panels.digits import big
from teegpu.monitor.plain import frame, progress_line
from teegpu.monitor.snapshot import Snapshot
from teegpu.monitor.state import LiveState
from tests.teegpu.monitor.madeup import MadeUp, meta
from tests.teegpu.monitor.scene import TEXT, decoding, prefilling

LETTERS = Look(letters=True)


def snapshot(made: MadeUp, **settings: object) -> Snapshot:
    about = meta(made.script)
    about["settings"] |= settings
    state = LiveState(about)
    state.add(made.events)
    return state.snapshot(made.clock.at)


@pytest.fixture(scope="module")
def decode() -> Snapshot:
    return snapshot(decoding(tokens=9))


def shown(lines: list[Line]) -> str:
    return "\n".join(plain(line).rstrip() for line in lines)


def told(expected: str) -> str:
    return textwrap.dedent(expected).strip("\n")


def test_a_frame(decode: Snapshot) -> None:
    assert shown(frame(decode, 100, LETTERS)) == told(
        """
         teegpu  smollm2-135m · fused · pipelined · fp16 · link rtt=5ms,bandwidth=1gbit     ● decode  0.4 s

        progress
         prefill  #########################################  1,024 tokens · 4 chunks · 36,699 tok/s · 0.0 s
         decode   ##--------------------------------  9 of ≤ 128 tokens · 24.7 tok/s · 0.4 s · ≤ 4.8 s left

        where the time goes
         now      TTTTTTTTTTTTTTTSSSSSSSNNNNNNNNNNNNNNNNNNNNNNNNNNNNQQQGGGGGGGGGGGGGGG  51.4% communication
         prefill  TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTSSSSSSSSSSSSSSSSNNNNNNNNGG  34.6% communication
         decode   TTTTTTTTTTTTTSSSSSSNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNQQQGGGGGGGGGGGGGGGG  52.7% communication

         T TEE 19.1%   S serialization 8.5%   N network 44.3%   Q server 4.7%   G GPU 23.5%

        communication
         52.7% of decode  ###########################################--------------------------------------
         RPC calls  414, 36 per token
         per-op     would have made 1,712 by now
         latency    748 µs median, 1.09 ms p95
         up         43.0 MiB  77.4 MiB/s
         down       148.6 MiB  267.6 MiB/s
         in flight  0   retries 0
         compressed off

        slowest layers of 18
         layer                                                                       now      mean  comm.
            17  TTTTTTTTSSSSNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNQQGGGGGGGGGG  2.98 ms   2.88 ms  65.3% ◀
         ▶   8  TTTTTTTTSSSSNNNNNNNNNNNNNNNNNNNQQGGGGGGGGGG                    2.12 ms   2.32 ms  52.1%
             1  TTTTTTTTSSSSNNNNNNNNNNNNNNNNNNQQGGGGGGGGGGG                    2.08 ms   2.32 ms  52.1%
             6  TTTTTTTTSSSSNNNNNNNNNNNNNNNNNNNQQGGGGGGGGGG                    2.09 ms   2.32 ms  52.0%
             5  TTTTTTTTSSSSNNNNNNNNNNNNNNNNNNNNQQGGGGGGGGGG                   2.14 ms   2.31 ms  52.0%

        operations, the first 8
          operation         where       count    total ▾    average      share
          LINEAR            GPU         1,242    93.2 ms    75.0 µs      23.8%  ######--------------------
          ATTENTION         TEE           414    18.4 ms    44.5 µs       4.7%  #-------------------------
          KV_CACHE          TEE           414    16.6 ms    40.0 µs       4.2%  #-------------------------
          RMSNORM           TEE           414    16.6 ms    40.0 µs       4.2%  #-------------------------
          ROTARY            TEE           414    16.6 ms    40.0 µs       4.2%  #-------------------------
          SILU              TEE           414    16.6 ms    40.0 µs       4.2%  #-------------------------
          ADD               GPU           414    10.3 ms    25.0 µs       2.6%  #-------------------------
          SAMPLING          TEE            10    1.00 ms     100 µs       0.3%  --------------------------

        both sides
         runner  412.0 MiB  1.3 cores  1 thread
         server  701.0 MiB  cpu bf16  1 thread
         at      embedded
         TEE     none: development mode
         keys    –

        advice and notes
           0.0 s  no endpoint given: embedded GPU server (threads: runner 1, server 1)
        """
    )


def test_a_line(decode: Snapshot) -> None:
    assert progress_line(decode) == (
        "0.4 s decode · 9 of at most 128 tokens · 24.7 tok/s · communication 52.7% · 414 RPC calls · at most 4.8 s left"
    )


def test_layers_at_a_glance_and_one_over_time(decode: Snapshot) -> None:
    assert shown(layers.profile(decode, 40, 6, LETTERS)) == told(
        """
                                          QQ
        GGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGNN
        NNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNN
        SSSSSSSSSSSSSSSSSSNNNNNNNNNNNNNNNNNN
        TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT
        layer 0       worst: 17, 2.88 ms  17
        """
    )
    assert shown(layers.detail(decode, 70, 8, LETTERS)) == told(
        """
        T TEE 445 µs   S serialization 200 µs   N network 991 µs
        Q server 111 µs   G GPU 556 µs
        NNNNNNNGGGGGGGQQQQQQQGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGG
        SSSSSSSNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNN
        TTTTTTTSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSS
        TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT
        first pass           full height 2.18 ms   mean 2.07 ms over 10 passes
        """
    )


def test_the_network(decode: Snapshot) -> None:
    assert shown(communication.over_time(decode, 50, 5, LETTERS)) == told(
        """
        QQQQQQQQQQQQQQQQQQQQQQQQQGGGGGGGGGGGGGGGGGGGGGGGGG
        NNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNNN
        SSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSS
        TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT
        0 s                                          0.4 s
        """
    )
    assert shown(communication.rates(decode, 60, 4, LETTERS)) == told(
        """
        up      ███████████████████▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁    77.4 MiB/s
        down    ███████████████████▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁   267.6 MiB/s
        tokens  ███████████████████▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆    26.2 tok/s
        calls   ███████████████████▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄         540/s
        """
    )
    assert shown(communication.latencies(decode, 50, 6, LETTERS)) == (
        "748 µs median  1.09 ms p95  1.21 ms max\n"
        "  ≤ 724 µs ##############------------------    99\n"
        " ≤ 1.02 ms ################################   225\n"
        " ≤ 1.45 ms ###-----------------------------    18"
    )
    assert shown(communication.endpoints(decode, 60, 8, LETTERS)) == told(
        """
        server           calls  retries        up       down
        embedded server    414        0  43.0 MiB  148.6 MiB
        in flight   0
        compressed  off
        as per-op   1,712 calls
        queue       20.0 µs a call
        keys        –
        """
    )


def test_where_there_is_little_room_the_least_goes_first(decode: Snapshot) -> None:
    assert shown(communication.latencies(decode, 36, 2, LETTERS)).splitlines()[0] == "748 µs median  1.09 ms p95"
    assert shown(communication.endpoints(decode, 36, 8, LETTERS)).splitlines()[:2] == [
        "server           calls  retries", "embedded server    414        0",
    ]  # fmt: skip
    assert "…" not in shown(communication.endpoints(decode, 36, 8, LETTERS))


def test_chunks_of_a_prefill() -> None:
    assert shown(layers.chunks(snapshot(prefilling()), 60, 10, LETTERS)) == told(
        """
        TEE ·   link ↑ 6 7 8   GPU 5   link ↓ 1 2 3 4   0 of 8 done
        chunk   1 #####################------------- link ↓  12/18
        chunk   2 ###################--------------- link ↓  11/18
        chunk   3 #################----------------- link ↓  10/18
        chunk   4 ###############------------------- link ↓   9/18
        chunk   5 #############--------------------- GPU      8/18
        chunk   6 ###########----------------------- link ↑   7/18
        chunk   7 #########------------------------- link ↑   6/18
        chunk   8 ########-------------------------- link ↑   5/18
        """
    )


def test_tiles(decode: Snapshot) -> None:
    assert overview.tiles(decode) == [
        ("53%", "network", "communication", "of decode"),
        ("24.7", "gpu", "tokens/s", "decode"),
        ("36", "serialization", "RPCs per token", "per-op: 164"),
        ("0.03", "tee", "s to first token", "TPOT 38.3 ms"),
    ]
    assert {len(row) for row in big("53%")} == {9}
    assert big("x") == (" ", "x", " ")


def test_before_the_first_whole_pass_of_a_phase_there_is_no_figure_per_token() -> None:
    made = decoding(tokens=0)
    assert snapshot(made).rpcs_per_token == 0
    assert overview.tiles(snapshot(made))[2][0] == "–"


def test_all_in_the_tee() -> None:
    state = snapshot(decoding(tokens=1), prefill_plan="local", decode_plan="local")
    assert shown(communication.communication(state, 60, 9, LETTERS)) == (
        "all is computed in the TEE: there is no communication"
    )
    assert "server" not in shown(overview.both_sides(state, 60, 9, LETTERS))
    assert "pipelined" not in shown([overview.header(state, 100)])


def test_the_text(decode: Snapshot) -> None:
    assert shown(text.tail(decode, 40, 4, LETTERS)) == "A trusted process keeps the prompt, the\ncache and all ▌"
    state = LiveState(meta())
    assert "not in the record" in shown(text.lines(state.snapshot(status="complete"), 80))
    state.add_text(TEXT + "\n\x1b[2J\tx")
    assert shown(text.lines(state.snapshot(status="complete"), 400)) == f"{TEXT}\n�[2J    x"


@pytest.mark.parametrize("order", ops.SORTS)
def test_operations_in_order(decode: Snapshot, order: str) -> None:
    found = ops.operations(decode, order, "decode")
    first = {"total": "LINEAR", "count": "LINEAR", "average": "SAMPLING", "name": "ADD"}
    assert found[0].name == first[order]
    assert len(found) == len({(op.name, op.where) for op in found})

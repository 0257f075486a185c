"""What the cut of a server over ranks costs: two ranks with half of the threads each beside one process with all.

Programs of one layer, with random values, straight to the executor: no client, no link. Both ways take turns. Give
``OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000``, as ``teegpu serve`` has it on up to four cores: threads that spin would
take the cores from the other rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

from benchmarks.harness import Script, in_pairs, model_of, ms, spread
from teegpu import facts
from teegpu.gpu import server as gpu
from teegpu.gpu.executor import Executor
from teegpu.gpu.group import Group
from teegpu.kernels import DTYPES
from teegpu.model.reader import read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.weights import WeightStore
from teegpu.tee import plans
from teegpu.wire.limits import Limits
from teegpu.wire.program import Program

GOAL = 1.25


def programs(spec: ModelSpec) -> dict[str, Program]:
    """Those of the first layer, by plan and name."""
    attention, fused = (plans.programs(spec, plan)[0] for plan in (facts.ATTENTION, facts.FUSED))
    return {
        "attention qkv": attention.qkv[0],
        "attention o": attention.o,
        "attention gate_up": attention.gate_up[0],
        "attention down": attention.down,
        "fused after attention": fused.after_attention,
        "fused after MLP": fused.after_mlp,
    }


def inputs(spec: ModelSpec, program: Program, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    widths = {step.inputs[0]: spec.weights[step.weights[0]][1] for step in program.steps if step.op == "linear"}
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(rows, widths.get(name, spec.hidden_size), generator=random).to(dtype)
        for name in program.inputs
    }


def lost(reason: str) -> NoReturn:
    raise SystemExit(reason)


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--ranks", type=int, default=2)
    script.parser.add_argument("--threads", type=int, default=2, help="of one process, and of all ranks together")
    script.parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    script.parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    script.parser.add_argument("--seconds", type=float, default=2.0, help="for each program and number of rows")
    given = script.parse(arguments)
    folder = model_of(script.settings())
    spec, dtype = read_spec(folder), DTYPES[given.dtype]
    counts = {False: given.threads, True: max(1, given.threads // given.ranks)}
    about = {"device": "cpu", "dtype": given.dtype, "limits": Limits(), "layers": (0, min(1, spec.layers - 1))}
    with Group(given.ranks, lost) as group, WeightStore(folder, spec) as store, torch.inference_mode():
        torch.set_num_threads(counts[True])
        executors = {
            on: gpu.load(store, spec, shield="off", group=group if on else None, **about)[0] for on in (True, False)
        }

        def seconds(executor: Executor, program: Program, values: dict[str, torch.Tensor]) -> float:
            started = time.perf_counter()
            executor.run(program, values, dict.fromkeys(program.outputs, given.dtype))
            return time.perf_counter() - started

        rows, results = [], []
        for name, program in programs(spec).items():
            for count in given.rows:
                script.tell(f"{name}, {count} rows")
                values = inputs(spec, program, count, dtype)

                def several(on: bool, program: Program = program, values: dict[str, torch.Tensor] = values) -> float:
                    """The median of some in a row: where threads were changed, the first ones wake them."""
                    torch.set_num_threads(counts[on])
                    return statistics.median(seconds(executors[on], program, values) for _ in range(5))

                turns = max(3, min(40, int(given.seconds / (5 * (several(False) + several(True))))))
                pairs = list(in_pairs(turns, several))
                one, shared = ([pair[side] for pair in pairs] for side in (0, 1))
                ratio = statistics.median(b / a for a, b in pairs)
                rows.append(
                    [name, str(count), ms(statistics.median(one)), ms(statistics.median(shared)), f"{ratio:.2f}"]
                )
                results.append(
                    {
                        "metrics": {"program": name, "rows": count, "ratio": ratio},
                        "one_process_seconds": spread(one),
                        "ranks_seconds": spread(shared),
                        "samples": pairs,
                    }
                )
    heads = ["program", "rows", "one process ms", f"{given.ranks} ranks ms", "ratio"]
    met = [row for row in rows if row[1] == "256" and float(row[4]) <= GOAL]
    of = [row for row in rows if row[1] == "256"]
    whole, part = (executors[on].weights.nbytes for on in (False, True))
    notes = [
        f"{spec.name} in {given.dtype}: one process with {counts[False]} threads, {given.ranks} ranks with "
        f"{counts[True]} each",
        f"weights: {whole:,} bytes in one process, {part:,} in a rank",
        f"at 256 rows {len(met)} of {len(of)} programs take at most {GOAL} × of one process",
    ]
    script.finish([heads, *rows], notes, results, folder=folder)


if __name__ == "__main__":
    main()

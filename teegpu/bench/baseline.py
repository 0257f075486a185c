"""transformers itself on this machine: the baseline of the benchmarks, and the reference of their output checks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from teegpu import machine
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.errors import UsageError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_quantisation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(folder: ModelFolder, dtype: str) -> Any:
    """The model of ``folder`` as transformers runs it, with its fastest attention for the CPU. Raises ``UsageError``
    for quantised weights, which it reads with the kernels of others, or rounds on the way."""
    if (quantisation := read_quantisation(folder)) is not None:
        raise UsageError(
            f"model '{folder.name}' is quantised ({quantisation.about}): transformers can't be what it is compared "
            "with; give the model that it was made from"
        )
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    ).eval()


def new_cache(model: Any) -> Any:
    """An empty KV cache of the kind that ``generate`` makes."""
    import transformers

    return transformers.DynamicCache(config=model.config)


class Baseline:
    """Prefill and greedy decode, with transformers' own KV cache and the work that ``generate`` does, no more."""

    def __init__(self, folder: ModelFolder, *, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load(folder, dtype)
        self.logits = torch.empty(0)
        """Of the last run, (tokens made, vocab): what each token was chosen from."""

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        """One run: the prompt and a first token, then ``decode_tokens`` more, the end token ignored."""
        model = self._model
        with torch.inference_mode():
            ticks = [time.perf_counter()]
            cache = new_cache(model)
            step = torch.tensor([list(prompt)])
            made: list[int] = []
            seen: list[torch.Tensor] = []
            for _ in range(decode_tokens + 1):
                # As in generate, the logits of the last position alone.
                logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                made.append(int(logits[0, -1].argmax()))
                seen.append(logits[0, -1:])
                step = torch.tensor([[made[-1]]])
                ticks.append(time.perf_counter())
        prefill = ticks[1] - ticks[0]
        decode = ticks[-1] - ticks[1]
        self.logits = torch.cat(seen)
        return Sample(
            prefill=PhaseSample(len(prompt), 1, prefill, tee_seconds=prefill),
            decode=PhaseSample(decode_tokens, decode_tokens, decode, tee_seconds=decode),
            ttft_seconds=prefill,
            tpot_median_seconds=statistics.median(b - a for a, b in pairwise(ticks[1:])) if decode_tokens else None,
            token_ids=made,
            peak_memory_bytes=machine.peak_memory_bytes(),
        )

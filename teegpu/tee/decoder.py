"""The decoder: one step of new tokens of any number of sequences, in reading order, for every plan.

What is linear goes through ``Products`` (the GPU server, or the TEE itself for ``local``); all else happens here. The
step is a coroutine: over a lock-step transport it never suspends, over a pipelined one several chunks of a prompt run
as coroutines that overlap, each layer of a chunk waiting only for the same layer of the chunk before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from teegpu.facts import Plan
from teegpu.model.spec import AFTER, BEFORE, WHOLE, ModelSpec
from teegpu.record.events import NO_LAYER, OTHER, TEE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, Products
from teegpu.tee.attention import Masks, attend, attend_side_by_side, first_visible
from teegpu.tee.kv_cache import KVCache, Neighbours
from teegpu.tee.nonlinear import (
    ACTIVATIONS,
    apply_rotary,
    capped,
    inverse_rms,
    rmsnorm,
    rmsnorm_of_heads,
    softmax,
)
from teegpu.tee.plans import CONTEXT, EMBED, LM_HEAD, SCORES, programs
from teegpu.tee.rotary import Rotary
from teegpu.tee.weights import TeeWeights
from teegpu.wire.program import Program

Want = Literal["none", "last", "all"]

_LARGEST_NORM = 4096.0
"""What a row's Euclidean norm is brought down to before it goes out in fp16, which ends at 65,504. A product with a
matrix is then at most this times the norm of the matrix's row (Cauchy-Schwarz), and those are below 16 in every model
we know."""


_WORTH_THREADS_BYTES = 2**20
"""Of keys and values in a layer. Below it one thread has attended by the time that another one would be awake, and that
one's core is the server's where both are on one machine."""


class Turn:
    """The order between the chunks of one prompt: at each layer a chunk waits until the one before has stored its
    keys."""

    def __init__(self, before: Turn | None = None) -> None:
        self._before = before
        self._reached = -1
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def wait(self, layer: int) -> None:
        before = self._before
        if before is not None and before._reached < layer:
            future = before._waiting[layer] = asyncio.get_running_loop().create_future()
            await future

    def passed(self, layer: int) -> None:
        self._reached = layer
        future = self._waiting.pop(layer, None)
        if future is not None and not future.done():
            future.set_result(None)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one sequence: ``ids`` (tokens,) int64 at positions ``start``… of ``cache``, which has room for them.
    ``want`` says which of their logits to compute; what only unwanted ones need is left out."""

    ids: torch.Tensor
    start: int
    cache: KVCache
    want: Want = "last"


@dataclass(frozen=True, slots=True)
class _Queries:
    """Rows ``first`` to ``last`` of a step, which are the tokens from position ``start`` on of one sequence."""

    cache: KVCache
    start: int
    first: int
    last: int

    @property
    def stop(self) -> int:
        return self.start + self.last - self.first


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows ``first`` to ``last`` of a step, one of each of several sequences that lie side by side."""

    neighbours: Neighbours
    first: int
    last: int


ALIKE = 1.5
"""Of sequences that are attended for together the longest is at most this times as long as the shortest: the rest of
them is computed for nothing."""


def _side_by_side(queries: Sequence[_Queries]) -> list[_Queries | _Rows]:
    """``queries``, those of sequences that lie side by side put together."""
    found: list[_Queries | _Rows] = []
    held: list[_Queries] = []

    def close() -> None:
        if len(held) > 1:
            cache = held[0].cache
            neighbours = Neighbours.of(cache.slab, cache.slot, [each.start for each in held])
            found.append(_Rows(neighbours, held[0].first, held[-1].last))
        else:
            found.extend(held)
        held.clear()

    for each in queries:
        if held:
            before = held[-1].cache
            starts = [one.stop for one in (*held, each)]
            beside = each.cache.slab is before.slab and each.cache.slot == before.slot + 1
            if not beside or each.last - each.first != 1 or max(starts) > ALIKE * min(starts):
                close()
        if each.last - each.first == 1:
            held.append(each)
        else:
            found.append(each)
    close()
    return found


class Step:
    """Spans, each of another sequence, that go through the model together, their rows one after the other: what is
    computed row by row does not know of sequences, attention goes by span.

    ``ids`` (tokens,) are the spans' own. ``wanted``: the rows whose logits are computed, or None for all of them.
    ``chunk`` and ``turn`` are the place of a step of one span among the chunks of its prompt."""

    def __init__(self, spans: Sequence[Span], chunk: int = 0, turn: Turn | None = None) -> None:
        self.ids = spans[0].ids if len(spans) == 1 else torch.cat([span.ids for span in spans])
        self.chunk = chunk
        self.turn = turn
        self.queries: list[_Queries] = []
        self.last_queries: list[_Queries] = []
        """Those of the last layer, in which ``wanted`` rows alone are left."""
        rows: list[int] = []
        first = 0
        for span in spans:
            last = first + span.ids.shape[0]
            self.queries.append(_Queries(span.cache, span.start, first, last))
            left = {"none": 0, "last": 1, "all": last - first}[span.want]
            if left:
                start = span.start + last - first - left
                self.last_queries.append(_Queries(span.cache, start, len(rows), len(rows) + left))
            rows.extend(range(last - left, last))
            first = last
        self._groups: dict[bool, list[_Queries | _Rows]] = {}
        self.wanted = None if len(rows) == first else torch.tensor(rows, dtype=torch.int64)
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def groups(self, *, last: bool) -> list[_Queries | _Rows]:
        """The queries (``last``: of the last layer), those of sequences that lie side by side together."""
        if last not in self._groups:
            self._groups[last] = _side_by_side(self.last_queries if last else self.queries)
        return self._groups[last]

    def angles(self, rotary: Rotary, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rows' positions in ``layer``, each (tokens, 1, half of a head's rotated values)."""
        number = rotary.of(layer)
        table = rotary.tables[number]
        if len(self.queries) == 1:
            return table.at(self.queries[0].start, self.queries[0].stop)
        if number not in self._angles:
            each = [table.at(span.start, span.stop) for span in self.queries]
            self._angles[number] = torch.cat([cos for cos, _ in each]), torch.cat([sin for _, sin in each])
        return self._angles[number]

    def grown(self, queries: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """``queries`` (tokens, heads, head_dim), those multiplied that grow with their position."""
        factors = [rotary.growth(span.start, span.stop) for span in self.queries]
        if all(factor is None for factor in factors):
            return queries
        spans = (queries[span.first : span.last] for span in self.queries)
        return torch.cat(
            [rows if factor is None else rows * factor for rows, factor in zip(spans, factors, strict=True)]
        )

    def call(self, program: Program, inputs: Mapping[str, torch.Tensor], layer: int = NO_LAYER) -> Call:
        return Call(program, inputs, layer, self.chunk, overlapped=self.turn is not None)


class Decoder:
    """Runs steps under one plan. Keeps nothing between steps but caches of constants.

    ``borders`` are the layers that another group of servers holds than the layer before: no program crosses one.
    ``alone``: each sequence is attended for by itself, so that its bits are the same whoever is beside it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: TeeWeights,
        rotary: Rotary,
        plan: Plan,
        products: Products,
        recorder: Recorder,
        borders: Collection[int] = (),
        *,
        alone: bool = False,
    ) -> None:
        self._alone = alone or plan.remote_attention
        self._light = plan.remote and not alone
        self.plan = plan
        self.products = products
        self._spec = spec
        self._weights = weights
        self._rotary = rotary
        self._record = recorder
        self._masks = Masks()
        self._programs = programs(spec, plan)
        self._borders = frozenset(borders)
        self._scale = 1.0 / math.sqrt(spec.head_dim)
        self._activation, self._activation_name = ACTIVATIONS[spec.activation]

    async def forward(self, work: Step) -> torch.Tensor | None:
        """Logits in fp32, (wanted rows, vocab), or None where none are wanted.

        Stores keys and values in the caches of the spans but leaves their ``length`` to the caller, who knows all
        chunks."""
        threads = torch.get_num_threads()
        if threads == 1 or not self._needs_one_thread(work):
            return await self._forward(work)
        torch.set_num_threads(1)
        try:
            return await self._forward(work)
        finally:
            torch.set_num_threads(threads)

    def _needs_one_thread(self, work: Step) -> bool:
        """Whether what is computed here is a few rows and short contexts. Not where chunks overlap: threads are the
        process's."""
        if not self._light or work.turn is not None or work.ids.shape[0] > len(work.queries):
            return False
        values = 2 * self._spec.kv_heads * self._spec.head_dim * sum(each.stop for each in work.queries)
        return values * torch.float32.itemsize < _WORTH_THREADS_BYTES

    async def _forward(self, work: Step) -> torch.Tensor | None:
        if not self.plan.fused:
            logits = await self._forward_plain(work)
        elif self._spec.norms == BEFORE:
            logits = await self._forward_fused(work)
        else:
            logits = await self._forward_joined(work)
        cap = self._spec.logits_cap
        if logits is not None and cap is not None:
            logits = capped(logits, cap)
            self._record.lap(TEE, "SOFTMAX", chunk=work.chunk)
        return logits

    # Plans whose norms and residual stay in the TEE

    async def _forward_plain(self, work: Step) -> torch.Tensor | None:
        spec, record = self._spec, self._record
        x = await self._embed(work)
        for layer, code in enumerate(self._programs):
            n = self._entering(x, f"layers.{layer}.input_layernorm", layer, work)
            qkv = await self._project(code.qkv, n, layer, work)
            attended = await self._attend(qkv, layer, work)
            if attended is None:
                return None
            if layer == spec.layers - 1 and work.wanted is not None:
                x = x[work.wanted]
            o = await self._project((code.o,), attended, layer, work)
            o = self._leaving(o, f"layers.{layer}.attention_output_norm", layer, work)
            x = x.add_(o)
            record.lap(TEE, "ADD", layer, work.chunk)
            n = self._entering(x, f"layers.{layer}.post_attention_layernorm", layer, work)
            gate_up = await self._project(code.gate_up, n, layer, work)
            h = self._activate(gate_up, layer, work)
            d = await self._project((code.down,), h, layer, work)
            d = self._leaving(d, f"layers.{layer}.mlp_output_norm", layer, work)
            x = x.add_(d)
            record.lap(TEE, "ADD", layer, work.chunk)
        n = self._norm(x, "norm", -1, work)
        return await self._project((LM_HEAD,), n, -1, work)

    async def _project(self, codes: tuple[Program, ...], source: torch.Tensor, layer: int, work: Step) -> torch.Tensor:
        """The products of one input with one or more matrices side by side, (tokens, sum of outs), biases included."""
        name = codes[0].inputs[0]
        scale = self._range_scale(source, layer, work) if self.products.narrow_range else None
        if scale is not None:
            source = source * scale.reciprocal()
            self._record.lap(TEE, "SCALE", layer, work.chunk)
        calls = [work.call(code, {name: source}, layer) for code in codes]
        answers = await self.products.run_all(calls) if len(calls) > 1 else [await self.products.run(calls[0])]
        parts = [
            self._finish(answer[code.outputs[0]], scale, code.weights)
            for code, answer in zip(codes, answers, strict=True)
        ]
        if scale is not None:
            self._record.lap(TEE, "SCALE", layer, work.chunk)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _finish(self, product: torch.Tensor, factor: torch.Tensor | None, weights: tuple[str, ...]) -> torch.Tensor:
        """``product · factor + bias`` in place, with the biases of ``weights``."""
        if factor is not None:
            product = product.mul_(factor)
        bias = self._weights.bias(weights)
        return product if bias is None else product.add_(bias)

    def _range_scale(self, source: torch.Tensor, layer: int, work: Step) -> torch.Tensor | None:
        """(tokens, 1) to divide ``source`` by where it would crowd fp16's range, or None where nothing does."""
        scale = _norm_of(source).div_(_LARGEST_NORM)
        crowded = float(scale.max()) > 1.0
        self._record.lap(TEE, "SCALE", layer, work.chunk)
        return scale.clamp_min_(1.0) if crowded else None

    def _norm(self, x: torch.Tensor, weight: str, layer: int, work: Step) -> torch.Tensor:
        n = rmsnorm(x, self._weights.vector(weight), self._spec.rms_eps)
        self._record.lap(TEE, "RMSNORM", layer, work.chunk)
        return n

    def _entering(self, x: torch.Tensor, weight: str, layer: int, work: Step) -> torch.Tensor:
        """What goes into attention or MLP: normalised, unless the model does that only with what comes out."""
        return x if self._spec.norms == AFTER else self._norm(x, weight, layer, work)

    def _leaving(self, x: torch.Tensor, weight: str, layer: int, work: Step) -> torch.Tensor:
        """What comes out of attention or MLP, normalised where the model does so."""
        return x if self._spec.norms == BEFORE else self._norm(x, weight, layer, work)

    def _activate(self, gate_up: torch.Tensor, layer: int, work: Step) -> torch.Tensor:
        h = self._activation(gate_up)
        self._record.lap(TEE, self._activation_name, layer, work.chunk)
        return h

    async def _embed(self, work: Step) -> torch.Tensor:
        if self.plan.remote_embedding:
            x = (await self.products.run(work.call(EMBED, {"ids": work.ids})))["x"]
        else:
            x = self._weights.embed(work.ids)
            self._record.lap(TEE, "EMBEDDING", chunk=work.chunk)
        if self._spec.embedding_scale != 1.0:
            x = x.mul_(self._spec.embedding_scale)
            self._record.lap(TEE, "EMBEDDING", chunk=work.chunk)
        return x

    # Attention, common to all plans

    async def _attend(self, qkv: torch.Tensor, layer: int, work: Step) -> torch.Tensor | None:
        """(tokens, heads · head_dim) from Q, K and V side by side; in the last layer of the wanted rows alone, or None
        where there are none."""
        spec, record = self._spec, self._record
        split = qkv.view(qkv.shape[0], spec.heads + 2 * spec.kv_heads, spec.head_dim)
        qk, v = split.split((spec.heads + spec.kv_heads, spec.kv_heads), dim=1)
        if spec.qk_norm:
            together = (spec.heads, spec.kv_heads) if spec.qk_norm == WHOLE else ()
            qk = rmsnorm_of_heads(qk, self._weights.head_norms(layer), spec.rms_eps, together)
            record.lap(TEE, "RMSNORM", layer, work.chunk)
        if layer not in spec.unrotated:
            qk = apply_rotary(qk, *work.angles(self._rotary, layer))
        q, k = qk.split((spec.heads, spec.kv_heads), dim=1)
        q = work.grown(q, self._rotary)
        record.lap(TEE, "ROTARY", layer, work.chunk)
        if work.turn is not None:
            await work.turn.wait(layer)
            record.lap(OTHER, "TURN", layer, work.chunk)
        groups: Sequence[_Queries | _Rows] = work.queries if self._alone else work.groups(last=False)
        for each in groups:
            keys, values = k[each.first : each.last], v[each.first : each.last]
            if isinstance(each, _Rows):
                each.neighbours.write(layer, keys, values)
            else:
                each.cache.write(layer, each.start, keys, values)
        record.lap(TEE, "KV_CACHE", layer, work.chunk)
        if work.turn is not None:
            work.turn.passed(layer)
        if layer == spec.layers - 1 and work.wanted is not None:
            groups = work.last_queries if self._alone else work.groups(last=True)
            if not groups:
                return None
            q = q[work.wanted]
        window = spec.layer_windows[layer]
        parts = []
        for each in groups:
            rows = q[each.first : each.last]
            if isinstance(each, _Rows):
                parts.append(
                    attend_side_by_side(
                        rows, *each.neighbours.read(layer), each.neighbours.mask, window, self._scale, spec.scores_cap
                    )
                )
                continue
            keys, values = each.cache.read(layer, first_visible(each.start, window), each.stop)
            if self.plan.remote_attention:
                parts.append(await self._attend_remotely(rows, keys, values, window, layer, work))
            else:
                parts.append(attend(rows, keys, values, self._masks, window, self._scale, spec.scores_cap))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self.plan.remote_attention:
            record.lap(TEE, "ATTENTION", layer, work.chunk)
        return attended

    async def _attend_remotely(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, layer: int, work: Step
    ) -> torch.Tensor:
        """QKᵀ and AV as programs of the server, the softmax between them here."""
        queries, positions = q.shape[0], keys.shape[1]
        call = work.call(SCORES, {"q": (q * self._scale).transpose(0, 1), "k": keys}, layer)
        scores = (await self.products.run(call))["scores"]
        if self._spec.scores_cap is not None:
            scores = capped(scores, self._spec.scores_cap)
        hidden = queries > 1 or (window is not None and positions > window)
        weights = softmax(scores, self._masks.get(queries, positions, window) if hidden else None)
        self._record.lap(TEE, "SOFTMAX", layer, work.chunk)
        context = (await self.products.run(work.call(CONTEXT, {"p": weights, "v": values}, layer)))["context"]
        return context.transpose(0, 1).reshape(queries, -1)

    # The fused plan: the server returns products of un-normalised rows, 1/rms is applied to them here

    async def _forward_fused(self, work: Step) -> torch.Tensor | None:
        x = await self._embed(work)
        out = await self._enter(x, 0, work)
        rms = inverse_rms(x, self._spec.rms_eps).reciprocal_() if self.products.narrow_range else None
        for layer, code in enumerate(self._programs):
            attended = await self._attend(out, layer, work)
            if attended is None:
                return None
            if layer == self._spec.layers - 1 and work.wanted is not None:
                x, rms = x[work.wanted], None if rms is None else rms[work.wanted]
            z, gate_up, rms = await self._fused_step(code.after_attention, attended, x, rms, layer, work)
            h = self._activate(gate_up, layer, work)
            if layer + 1 in self._borders:
                x, _, rms = await self._fused_step(code.end, h, z, rms, layer, work)
                out = await self._enter(x, layer + 1, work)
            else:  # Q, K and V of the next layer, or logits
                x, out, rms = await self._fused_step(code.after_mlp, h, z, rms, layer, work)
        return out

    async def _enter(self, x: torch.Tensor, layer: int, work: Step) -> torch.Tensor:
        """Q, K and V of the first layer of a group, whose server has nothing of the layer before to go on from: the
        norm is done here."""
        n = self._entering(x, f"layers.{layer}.input_layernorm", layer, work)
        return await self._project(self._programs[layer].qkv, n, layer, work)

    async def _fused_step(
        self,
        code: Program,
        values: torch.Tensor,
        residual: torch.Tensor,
        rms: torch.Tensor | None,
        layer: int,
        work: Step,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Sends one fused program; returns the new residual, the product of what the server would have normalised, and
        the residual's rms where rows are scaled. A program that ends with the residual has no product but that.

        Rows are divided by a scale on the way out and multiplied back: linear, so exact up to rounding, and it keeps
        fp16 in range. The scale is the row's last known rms, or more where the entering values are far larger than
        that."""
        first, last = code.steps[0], code.steps[-1]
        offset = self._weights.bias(first.weights)
        if offset is not None:
            residual = residual + offset
        scale = None
        if rms is not None:
            scale = torch.maximum(rms, _norm_of(values).div_(_LARGEST_NORM))
            inverse = scale.reciprocal()
            values, residual = values * inverse, residual * inverse
        self._record.lap(TEE, "SCALE", layer, work.chunk)
        inputs = dict(zip(code.inputs, (values, residual), strict=True))
        answer = await self.products.run(work.call(code, inputs, layer))
        new = answer[code.outputs[0]]
        if scale is not None:
            new = new.mul_(scale)
        factor = inverse_rms(new, self._spec.rms_eps)
        if scale is not None:
            rms, factor = factor.reciprocal(), factor * scale
        product = new if last.output in code.outputs[:1] else self._finish(answer[last.output], factor, last.weights)
        self._record.lap(TEE, "RMSNORM", layer, work.chunk)
        return new, product, rms

    # The same where what comes out of attention and MLP is normalised: products of it and of the residual, joined here

    async def _forward_joined(self, work: Step) -> torch.Tensor | None:
        x = await self._embed(work)
        out = await self._enter(x, 0, work)
        for layer, code in enumerate(self._programs):
            attended = await self._attend(out, layer, work)
            if attended is None:
                return None
            if layer == self._spec.layers - 1 and work.wanted is not None:
                x = x[work.wanted]
            norm = f"layers.{layer}.attention_output_norm"
            x, gate_up = await self._joined_step(code.after_attention, attended, x, norm, layer, work)
            h = self._activate(gate_up, layer, work)
            norm = f"layers.{layer}.mlp_output_norm"
            if layer + 1 in self._borders:
                d = self._leaving(await self._project((code.end,), h, layer, work), norm, layer, work)
                x = x.add_(d)
                self._record.lap(TEE, "ADD", layer, work.chunk)
                out = await self._enter(x, layer + 1, work)
            else:  # Q, K and V of the next layer, or logits
                x, out = await self._joined_step(code.after_mlp, h, x, norm, layer, work)
        return out

    async def _joined_step(
        self, code: Program, values: torch.Tensor, residual: torch.Tensor, norm: str, layer: int, work: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends such a program; returns the new residual, and the product of that.

        With a narrow range rows are divided on the way out and multiplied back. What is normalised afterwards may come
        back as small as it likes, and its product is as large as the weight of that norm makes it: it decides."""
        weight, eps = self._weights.vector(norm), self._spec.rms_eps
        sent, scales = [values, residual], []
        if self.products.narrow_range:
            most = max(1.0, float(weight.abs().max()))
            scales = [inverse_rms(values, eps).reciprocal_().mul_(most), inverse_rms(residual, eps).reciprocal_()]
            sent = [rows / scale for rows, scale in zip(sent, scales, strict=True)]
        self._record.lap(TEE, "SCALE", layer, work.chunk)
        answer = await self.products.run(work.call(code, dict(zip(code.inputs, sent, strict=True)), layer))
        added, by_added, by_residual = (answer[name] for name in code.outputs)
        if scales:
            added, by_added, by_residual = added.mul_(scales[0]), by_added.mul_(scales[0]), by_residual.mul_(scales[1])
        factor = inverse_rms(added, eps)
        new = torch.addcmul(residual, added.mul_(weight), factor)
        product = by_residual.addcmul_(by_added, factor)
        normalised = code.steps[-1].inputs[0] != code.inputs[1]
        product = self._finish(product, inverse_rms(new, eps) if normalised else None, code.steps[-1].weights)
        self._record.lap(TEE, "RMSNORM", layer, work.chunk)
        return new, product


def _norm_of(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row, (tokens, n) → (tokens, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

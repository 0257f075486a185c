"""The decoder: one forward pass over new tokens, in reading order, for every plan.

What is linear goes through ``Products`` (the GPU server, or the TEE itself for ``local``); all else happens here. The
pass is a coroutine: over a lock-step transport it never suspends, over a pipelined one several chunks of a prompt run
as coroutines that overlap, each layer of a chunk waiting only for the same layer of the chunk before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from teegpu.metrics.events import OTHER, TEE
from teegpu.metrics.recorder import Recorder
from teegpu.model.spec import ModelSpec
from teegpu.tee.attention import Masks, attend, first_visible
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.nonlinear import apply_rotary, inverse_rms, rmsnorm, silu_product, softmax
from teegpu.tee.plans import CONTEXT, EMBED, LM_HEAD, SCORES, Plan, programs
from teegpu.tee.products import Call, Products
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.weights import TeeWeights
from teegpu.wire.program import Program

Want = Literal["none", "last", "all"]

_LARGEST_NORM = 4096.0
"""What a row's Euclidean norm is brought down to before it goes out in fp16, which ends at 65,504. A product with a
matrix is then at most this times the norm of the matrix's row (Cauchy-Schwarz), and those are below 16 in every model
we know."""


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


@dataclass(slots=True)
class Pass:
    """One forward pass: ``ids`` (tokens,) int64 at positions ``start``… of ``cache``, which has room for them.

    ``want`` says which logits to compute; what only unwanted ones need is left out. ``chunk`` and ``turn`` are its
    place among the chunks of a prompt.
    """

    ids: torch.Tensor
    start: int
    cache: KVCache
    want: Want = "last"
    chunk: int = 0
    turn: Turn | None = None

    @property
    def stop(self) -> int:
        return self.start + self.ids.shape[0]


class Decoder:
    """Runs passes under one plan. Keeps nothing between passes but caches of constants.

    ``borders`` are the layers that another group of servers holds than the layer before: no program crosses one."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: TeeWeights,
        rotary: RotaryTable,
        plan: Plan,
        products: Products,
        recorder: Recorder,
        borders: Collection[int] = (),
    ) -> None:
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

    async def forward(self, work: Pass) -> torch.Tensor | None:
        """Logits in fp32: (1, vocab) of the last token, (tokens, vocab) of all, or None, as ``work.want`` says.

        Stores keys and values in ``work.cache`` but leaves its ``length`` to the caller, who knows all chunks.
        """
        if self.plan.fused:
            return await self._forward_fused(work)
        return await self._forward_plain(work)

    # Plans whose norms and residual stay in the TEE

    async def _forward_plain(self, work: Pass) -> torch.Tensor | None:
        spec, record = self._spec, self._record
        x = await self._embed(work)
        for layer, code in enumerate(self._programs):
            n = self._norm(x, f"layers.{layer}.input_layernorm", layer, work)
            q, k, v = await self._project(code.qkv, n, layer, work)
            attended = await self._attend(q, k, v, layer, work)
            if attended is None:
                return None
            if layer == spec.layers - 1 and work.want == "last":
                attended, x = attended[-1:], x[-1:]
            (o,) = await self._project((code.o,), attended, layer, work)
            x = x.add_(o) if x.shape[0] == work.ids.shape[0] else x + o
            record.lap(TEE, "ADD", layer, work.chunk)
            n = self._norm(x, f"layers.{layer}.post_attention_layernorm", layer, work)
            gate, up = await self._project(code.gate_up, n, layer, work)
            h = self._silu(gate, up, layer, work)
            (d,) = await self._project((code.down,), h, layer, work)
            x = x.add_(d)
            record.lap(TEE, "ADD", layer, work.chunk)
        n = self._norm(x, "norm", -1, work)
        (logits,) = await self._project((LM_HEAD,), n, -1, work)
        return logits

    async def _project(
        self, codes: tuple[Program, ...], source: torch.Tensor, layer: int, work: Pass
    ) -> list[torch.Tensor]:
        """The products of one input with one or more matrices, biases included."""
        name = codes[0].inputs[0]
        scale = self._range_scale(source, layer, work) if self.products.narrow_range else None
        if scale is not None:
            source = source * scale.reciprocal()
            self._record.lap(TEE, "SCALE", layer, work.chunk)
        calls = [Call(code, {name: source}, layer, work.chunk) for code in codes]
        if len(calls) == 1:
            outputs = await self.products.run(calls[0])
        else:
            outputs = {}
            for part in await self.products.run_all(calls):
                outputs.update(part)
        results = []
        for code in codes:
            for step in code.steps:
                value = outputs[step.output]
                if scale is not None:
                    value = value.mul_(scale)
                bias = self._weights.maybe(f"{step.weight}.bias")
                results.append(value if bias is None else value.add_(bias))
        if scale is not None:
            self._record.lap(TEE, "SCALE", layer, work.chunk)
        return results

    def _range_scale(self, source: torch.Tensor, layer: int, work: Pass) -> torch.Tensor | None:
        """(tokens, 1) to divide ``source`` by where it would crowd fp16's range, or None where nothing does."""
        scale = _norm_of(source).div_(_LARGEST_NORM)
        crowded = float(scale.max()) > 1.0
        self._record.lap(TEE, "SCALE", layer, work.chunk)
        return scale.clamp_min_(1.0) if crowded else None

    def _norm(self, x: torch.Tensor, weight: str, layer: int, work: Pass) -> torch.Tensor:
        n = rmsnorm(x, self._weights.vector(weight), self._spec.rms_eps)
        self._record.lap(TEE, "RMSNORM", layer, work.chunk)
        return n

    def _silu(self, gate: torch.Tensor, up: torch.Tensor, layer: int, work: Pass) -> torch.Tensor:
        h = silu_product(gate, up)
        self._record.lap(TEE, "SILU", layer, work.chunk)
        return h

    async def _embed(self, work: Pass) -> torch.Tensor:
        if self.plan.remote_embedding:
            return (await self.products.run(Call(EMBED, {"ids": work.ids}, chunk=work.chunk)))["x"]
        x = self._weights.embed(work.ids)
        self._record.lap(TEE, "EMBEDDING", chunk=work.chunk)
        return x

    # Attention, common to all plans

    async def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, work: Pass
    ) -> torch.Tensor | None:
        """(tokens, heads · head_dim), of the last token alone or None where the rest is not wanted in the last
        layer."""
        spec, record, cache = self._spec, self._record, work.cache
        tokens = work.ids.shape[0]
        last_layer = layer == spec.layers - 1
        q = q.reshape(tokens, spec.heads, spec.head_dim)
        k = k.reshape(tokens, spec.kv_heads, spec.head_dim)
        if spec.qk_norm:
            q = rmsnorm(q, self._weights.vector(f"layers.{layer}.q_norm"), spec.rms_eps)
            k = rmsnorm(k, self._weights.vector(f"layers.{layer}.k_norm"), spec.rms_eps)
            record.lap(TEE, "RMSNORM", layer, work.chunk)
        cos, sin = self._rotary.at(work.start, work.stop)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        record.lap(TEE, "ROTARY", layer, work.chunk)
        if work.turn is not None:
            await work.turn.wait(layer)
            record.lap(OTHER, "TURN", layer, work.chunk)
        cache.write(layer, work.start, k, v.reshape(tokens, spec.kv_heads, spec.head_dim))
        record.lap(TEE, "KV_CACHE", layer, work.chunk)
        if work.turn is not None:
            work.turn.passed(layer)
        start = work.start
        if last_layer and work.want != "all":
            if work.want == "none":
                return None
            q, start = q[-1:], work.stop - 1
        window = spec.layer_windows[layer]
        keys, values = cache.read(layer, first_visible(start, window), work.stop)
        if self.plan.remote_attention:
            return await self._attend_remotely(q, keys, values, window, layer, work)
        attended = attend(q, keys, values, self._masks, window, self._scale)
        record.lap(TEE, "ATTENTION", layer, work.chunk)
        return attended

    async def _attend_remotely(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, layer: int, work: Pass
    ) -> torch.Tensor:
        """QKᵀ and AV as programs of the server, the softmax between them here."""
        queries, positions = q.shape[0], keys.shape[1]
        call = Call(SCORES, {"q": (q * self._scale).transpose(0, 1), "k": keys}, layer, work.chunk)
        scores = (await self.products.run(call))["scores"]
        hidden = queries > 1 or (window is not None and positions > window)
        weights = softmax(scores, self._masks.get(queries, positions, window) if hidden else None)
        self._record.lap(TEE, "SOFTMAX", layer, work.chunk)
        context = (await self.products.run(Call(CONTEXT, {"p": weights, "v": values}, layer, work.chunk)))["context"]
        return context.transpose(0, 1).reshape(queries, -1)

    # The fused plan: the server returns products of un-normalised rows, 1/rms is applied to them here

    async def _forward_fused(self, work: Pass) -> torch.Tensor | None:
        spec = self._spec
        x = await self._embed(work)
        out = await self._enter(x, 0, work)
        factor: torch.Tensor | None = None
        rms = inverse_rms(x, spec.rms_eps).reciprocal_() if self.products.narrow_range else None
        for layer, code in enumerate(self._programs):
            prefix = f"layers.{layer}."
            q, k, v = (self._finish(out[name], factor, f"{prefix}{name}_proj.bias") for name in ("q", "k", "v"))
            self._record.lap(TEE, "RMSNORM", layer, work.chunk)
            attended = await self._attend(q, k, v, layer, work)
            if attended is None:
                return None
            if attended.shape[0] != x.shape[0]:
                x, rms = x[-1:], None if rms is None else rms[-1:]
            z, out, rms, factor = await self._fused_step(
                code.after_attention, ("a", attended), ("x", x), prefix + "o_proj.bias", rms, layer, work
            )
            gate = self._finish(out["gate"], factor, prefix + "gate_proj.bias")
            up = self._finish(out["up"], factor, prefix + "up_proj.bias")
            self._record.lap(TEE, "RMSNORM", layer, work.chunk)
            h = self._silu(gate, up, layer, work)
            border = layer + 1 in self._borders
            following = code.end if border else code.after_mlp
            x, out, rms, factor = await self._fused_step(
                following, ("h", h), ("z", z), prefix + "down_proj.bias", rms, layer, work
            )
            if border:
                out, factor = await self._enter(x, layer + 1, work), None
        logits = self._finish(out["logits"], factor, "")
        self._record.lap(TEE, "RMSNORM", chunk=work.chunk)
        return logits

    async def _enter(self, x: torch.Tensor, layer: int, work: Pass) -> dict[str, torch.Tensor]:
        """Q, K and V of the first layer of a group, whose server has nothing of the layer before to go on from: the
        norm is done here."""
        n = self._norm(x, f"layers.{layer}.input_layernorm", layer, work)
        return await self.products.run(Call(self._programs[layer].qkv[0], {"n": n}, layer, work.chunk))

    async def _fused_step(
        self,
        code: Program,
        entering: tuple[str, torch.Tensor],
        residual: tuple[str, torch.Tensor],
        bias: str,
        rms: torch.Tensor | None,
        layer: int,
        work: Pass,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """Sends one fused program; returns the new residual, the outputs, its rms, and the factor (tokens, 1) that
        turns the outputs into what they would be had the server normalised.

        Rows are divided by a scale on the way out and multiplied back: linear, so exact up to rounding, and it keeps
        fp16 in range. The scale is the row's last known rms, or more where the entering values are far larger than
        that."""
        (name, values), (residual_name, rest) = entering, residual
        offset = self._weights.maybe(bias)
        if offset is not None:
            rest = rest + offset
        scale = None
        if rms is not None:
            scale = torch.maximum(rms, _norm_of(values).div_(_LARGEST_NORM))
            inverse = scale.reciprocal()
            values, rest = values * inverse, rest * inverse
        self._record.lap(TEE, "SCALE", layer, work.chunk)
        out = await self.products.run(Call(code, {name: values, residual_name: rest}, layer, work.chunk))
        new = out[code.outputs[0]]
        if scale is not None:
            new = new.mul_(scale)
        factor = inverse_rms(new, self._spec.rms_eps)
        if rms is not None and scale is not None:
            rms = factor.reciprocal()
            factor = factor * scale
        self._record.lap(TEE, "RMSNORM", layer, work.chunk)
        return new, out, rms, factor

    def _finish(self, product: torch.Tensor, factor: torch.Tensor | None, bias: str) -> torch.Tensor:
        """``product · factor + bias`` in place."""
        if factor is not None:
            product = product.mul_(factor)
        offset = self._weights.maybe(bias) if bias else None
        return product if offset is None else product.add_(offset)


def _norm_of(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row, (tokens, n) → (tokens, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

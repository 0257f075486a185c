"""How a decoder is cut into programs. A plan is data; the decoder reads it, and nothing else differs between plans."""

from __future__ import annotations

from dataclasses import dataclass

from teegpu.errors import ConfigError, nearest
from teegpu.model.spec import ModelSpec
from teegpu.wire.program import Program, Step, linear, single


@dataclass(frozen=True, slots=True)
class Plan:
    """``remote``: products go to the GPU server. ``merged``: projections that share an input travel in one program.
    ``remote_attention``: QKᵀ and AV are products of the server, so scores cross the link. ``remote_embedding``: the
    server looks token ids up, and so sees them. ``fused``: the server goes on past the norms, with the residual."""

    name: str
    remote: bool = True
    merged: bool = True
    remote_attention: bool = False
    remote_embedding: bool = False
    fused: bool = False

    def rpc_calls(self, layers: int, groups: int = 1) -> int:
        """RPCs of one pass over the whole model in one chunk, its last logits included. ``groups``: over how many
        groups of servers the layers are cut."""
        if not self.remote:
            return 0
        if self.fused:
            return 2 * layers + 1 + (groups - 1)
        projections = 4 if self.merged else 7
        per_layer = projections + (2 if self.remote_attention else 0)
        return per_layer * layers + 1 + (1 if self.remote_embedding else 0)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("local", remote=False),
        Plan("per-op", merged=False, remote_attention=True, remote_embedding=True),
        Plan("batched", remote_attention=True, remote_embedding=True),
        Plan("attention"),
        Plan("fused", fused=True),
    )
}


def get(name: str) -> Plan:
    """The plan called ``name``. Raises ``ConfigError``."""
    plan = PLANS.get(name)
    if plan is None:
        raise ConfigError(f"unknown plan '{name}'{nearest(name, list(PLANS))}; plans are {', '.join(PLANS)}")
    return plan


QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")

EMBED = single(["ids"], Step("embedding", "x", ("ids",), "embed_tokens"))
SCORES = single(["q", "k"], Step("matmul", "scores", ("q", "k"), transpose=True))
CONTEXT = single(["p", "v"], Step("matmul", "context", ("p", "v")))
LM_HEAD = single(["n"], linear("logits", "lm_head", "n"))


@dataclass(frozen=True, slots=True)
class LayerPrograms:
    """The programs of one layer. ``qkv`` and ``gate_up`` hold one program each when the plan merges them, else one per
    projection. The last three are the fused plan's: from attention to gate and up, from ``h`` to the next layer, and
    ``end``, from ``h`` to the end of the layer, for where the next one is on another server.

    All but ``after_mlp`` take the weights of their own layer alone; ``after_mlp`` also takes those of the next layer,
    or of lm_head after the last one."""

    qkv: tuple[Program, ...]
    o: Program
    gate_up: tuple[Program, ...]
    down: Program
    after_attention: Program
    after_mlp: Program
    end: Program

    @property
    def plain(self) -> tuple[Program, ...]:
        """The programs of the plans that keep norms and residual in the TEE."""
        return (*self.qkv, self.o, *self.gate_up, self.down)


def programs(spec: ModelSpec, plan: Plan) -> list[LayerPrograms]:
    """The programs of every layer of ``spec`` under ``plan``."""
    return [_layer(spec, plan, layer) for layer in range(spec.layers)]


def _layer(spec: ModelSpec, plan: Plan, layer: int) -> LayerPrograms:
    prefix = f"layers.{layer}."
    qkv = tuple(linear(name, f"{prefix}{name}_proj", "n") for name in QKV)
    gate_up = tuple(linear(name, f"{prefix}{name}_proj", "n") for name in GATE_UP)
    o = linear("o", prefix + "o_proj", "a")
    down = linear("d", prefix + "down_proj", "h")
    post_norm = Step("scale", "n", ("z",), prefix + "post_attention_layernorm")
    return LayerPrograms(
        qkv=_grouped(qkv, plan.merged),
        o=single(["a"], o),
        gate_up=_grouped(gate_up, plan.merged),
        down=single(["h"], down),
        after_attention=Program(("a", "x"), (o, Step("add", "z", ("x", "o")), post_norm, *gate_up), ("z", *GATE_UP)),
        after_mlp=_after_mlp(spec, layer, down),
        end=Program(("h", "z"), (down, Step("add", "x", ("z", "d"))), ("x",)),
    )


def _after_mlp(spec: ModelSpec, layer: int, down: Step) -> Program:
    """``x = z + down(h)``, then the next layer's norm scale and QKV; after the last layer the final norm and
    lm_head."""
    following = layer + 1
    if following == spec.layers:
        norm = "norm"
        heads: tuple[Step, ...] = (linear("logits", "lm_head", "n"),)
    else:
        norm = f"layers.{following}.input_layernorm"
        heads = tuple(linear(name, f"layers.{following}.{name}_proj", "n") for name in QKV)
    steps = (down, Step("add", "x", ("z", "d")), Step("scale", "n", ("x",), norm), *heads)
    return Program(("h", "z"), steps, ("x", *(head.output for head in heads)))


def _grouped(steps: tuple[Step, ...], merged: bool) -> tuple[Program, ...]:
    if merged:
        return (Program(("n",), steps, tuple(step.output for step in steps)),)
    return tuple(single(["n"], step) for step in steps)

"""The programs of a decoder under a plan. A plan is data (``facts.PLANS``); the decoder reads it, and nothing else
differs between plans."""

from __future__ import annotations

from dataclasses import dataclass

from teegpu.facts import Plan
from teegpu.model.spec import AFTER, BEFORE, GROUPS, ModelSpec
from teegpu.wire.program import Program, Step, linear, single

QKV, ATTENDED, GATE_UP, DOWN = GROUPS

EMBED = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))
SCORES = single(["q", "k"], Step("matmul", "scores", ("q", "k"), transpose=True))
CONTEXT = single(["p", "v"], Step("matmul", "context", ("p", "v")))
LM_HEAD = single(["n"], linear("logits", "n", "lm_head"))


@dataclass(frozen=True, slots=True)
class LayerPrograms:
    """The programs of one layer. ``qkv`` and ``gate_up`` are one program, whose output has the products side by side,
    or one for each projection where the plan does not merge them. The last three are the fused plan's: from attention
    to gate and up, from ``h`` to the next layer, and ``end``, from ``h`` to the end of the layer, for where the next
    one is on another server.

    Where what comes out of attention and MLP is normalised before it is added to the residual, a server can't add it:
    the 1/rms of the one is not the other's. So ``after_attention`` and ``after_mlp`` give it as it is, and the next
    products of both: of it, as if its 1/rms were one, and of the residual before it. The TEE joins them.

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
    o, down = linear("o", "a", *_names(layer, ATTENDED)), linear("d", "h", *_names(layer, DOWN))
    gate_up = linear("gate_up", "n", *_names(layer, GATE_UP))
    if spec.norms != BEFORE:
        return _layer_of_normed_products(spec, plan, layer, o, gate_up, down)
    post_norm = Step("scale", "n", ("z",), (f"layers.{layer}.post_attention_layernorm",))
    following = layer + 1
    if following == spec.layers:
        norm, head = "norm", LM_HEAD.steps[0]
    else:
        norm, head = f"layers.{following}.input_layernorm", _qkv(following)
    add = Step("add", "x", ("z", "d"))
    return LayerPrograms(
        qkv=_programs(_qkv(layer), plan),
        o=single(["a"], o),
        gate_up=_programs(gate_up, plan),
        down=single(["h"], down),
        after_attention=Program(
            ("a", "x"), (o, Step("add", "z", ("x", "o")), post_norm, gate_up), ("z", gate_up.output)
        ),
        after_mlp=Program(("h", "z"), (down, add, Step("scale", "n", ("x",), (norm,)), head), ("x", head.output)),
        end=Program(("h", "z"), (down, add), ("x",)),
    )


def _layer_of_normed_products(
    spec: ModelSpec, plan: Plan, layer: int, o: Step, gate_up: Step, down: Step
) -> LayerPrograms:
    following, name = layer + 1, f"layers.{layer}."
    into_mlp, into_next = name + "post_attention_layernorm", f"layers.{layer + 1}.input_layernorm"
    head = LM_HEAD.steps[0] if following == spec.layers else _qkv(following)
    if spec.norms == AFTER:
        into_mlp = into_next = ""
    if following == spec.layers:
        into_next = "norm"
    return LayerPrograms(
        qkv=_programs(_qkv(layer), plan),
        o=single(["a"], o),
        gate_up=_programs(gate_up, plan),
        down=single(["h"], down),
        after_attention=_both(o, name + "attention_output_norm", into_mlp, gate_up),
        after_mlp=_both(down, name + "mlp_output_norm", into_next, head),
        end=single(["h"], down),
    )


def _both(first: Step, norm: str, into: str, product: Step) -> Program:
    """``first``, and ``product`` of it and of the residual ``x``, each times the weight of the norm ``into``."""
    steps = [first, Step("scale", "s", (first.output,), (norm,))]
    added, residual = "s", "x"
    if into:
        steps += [Step("scale", "t", ("s",), (into,)), Step("scale", "n", ("x",), (into,))]
        added, residual = "t", "n"
    steps.append(linear(product.output, added, *product.weights))
    steps.append(linear(f"{product.output}_x", residual, *product.weights))
    return Program((*first.inputs, "x"), tuple(steps), (first.output, product.output, f"{product.output}_x"))


def _qkv(layer: int) -> Step:
    return linear("qkv", "n", *_names(layer, QKV))


def _names(layer: int, group: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"layers.{layer}.{projection}" for projection in group)


def _programs(step: Step, plan: Plan) -> tuple[Program, ...]:
    """``step`` as the plan sends it: as one program, or as one for each of its weights."""
    if plan.merged:
        return (single(step.inputs, step),)
    return tuple(
        single(step.inputs, linear(name.rpartition(".")[2].removesuffix("_proj"), *step.inputs, name))
        for name in step.weights
    )

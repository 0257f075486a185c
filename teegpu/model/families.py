"""The table of architectures for people: who it is for, what is special in each, and with what it can be computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from teegpu import facts
from teegpu.model.arch import ALWAYS, ARCHITECTURES, BY_LAYER, REFUSED, SLIDING, TEXT_OF, Architecture
from teegpu.model.gguf_file import ARCHITECTURES as GGUF_ARCHITECTURES
from teegpu.model.spec import AROUND, BEFORE, HEADS

YES: Final = "yes"
TWICE: Final = "two products"
"""In the plan ``fused``, where what comes out of attention and MLP is normalised (``tee.plans``)."""


def table() -> list[list[str]]:
    """Headings, then a row for each architecture."""
    headings = ["models", "model_type", *facts.PLANS, *private(), ".gguf", "of its own"]
    return [headings, *(_line(name, row) for name, row in ARCHITECTURES.items())]


def refused() -> list[list[str]]:
    """Headings, then a row for each kind of model that is refused by name."""
    kinds = [[kind, ", ".join(names), reason] for kind, (reason, names) in REFUSED.items()]
    return [["refused", "model_type begins with", "because"], *kinds]


def plans(architecture: str) -> dict[str, str]:
    """With what each plan computes it: YES, or TWICE."""
    after = ARCHITECTURES[architecture].norms != BEFORE
    return {plan.name: TWICE if plan.fused and after else YES for plan in facts.PLANS.values()}


def private() -> dict[str, dict[str, str]]:
    """Private mode → plan → why the mode refuses it, or nothing; whatever the architecture: those that it could not
    hide have no row."""
    return {
        mode.name: {
            plan.name: "" if plan.name in mode.plans(verified=False) else plan.shows for plan in facts.PLANS.values()
        }
        for mode in facts.PRIVACY.values()
        if mode.hides
    }


def refused_plans() -> list[list[str]]:
    """Headings, then a row for each plan that a private mode refuses."""
    modes = private()
    found = [
        [plan, ", ".join(mode for mode, why in modes.items() if why[plan]), facts.PLANS[plan].shows]
        for plan in facts.PLANS
    ]
    return [["plan", "refused with --privacy", "because"], *(row for row in found if row[1])]


def _line(name: str, row: Architecture) -> list[str]:
    gguf = YES if name in GGUF_ARCHITECTURES.values() else "no"
    modes = [YES if "" in refused.values() else "no" for refused in private().values()]
    return [row.models, name, *plans(name).values(), *modes, gguf, ", ".join(_special(row)) or "nothing"]


def _special(row: Architecture) -> Iterator[str]:
    biases = {"Q, K, V": row.qkv_bias, "O": row.o_bias, "MLP": row.mlp_bias}
    for which, words in ((ALWAYS, "bias in"), ("", "may have a bias in")):
        found = [part for part, key in biases.items() if key and (key == ALWAYS) == (which == ALWAYS)]
        if found and row.norms == BEFORE:
            yield f"{words} {', '.join(found)}"
    if row.windows == SLIDING:
        yield "one window for all layers"
    if row.windows == BY_LAYER:
        yield "windows in some layers"
    if row.two_ropes:
        yield "other rotary angles in these"
    if row.unrotated:
        yield "layers without rotation"
    if row.rotation:
        yield "may rotate nothing"
    if row.partial:
        yield "a part of each head rotated"
    if row.long_queries:
        yield "queries that grow with their position"
    if row.qk_norm:
        yield f"queries and keys normalised{', each head' if row.qk_norm == HEADS else ', all heads together'}"
    if row.norms != BEFORE:
        yield f"norms after attention and MLP{', and before' if row.norms == AROUND else ' alone'}"
    if row.norm_offset:
        yield f"{row.norm_offset:g} + w in norms"
    if row.joined:
        yield "joined tensors in the files"
    scalars = (row.embedding_scale, row.residual_scale, row.attention_scale, row.query_scalar, row.logits_divisor)
    if any(scalars):
        yield "scalars"
    if row.scores_cap or row.logits_cap:
        yield "caps"


def page() -> str:
    """All of it as a page in Markdown."""
    return f"""# Models

`teegpu model families` writes this page, from the table of architectures that runner and servers read
(`model/arch.py`). A test computes each row in each plan, and in each private mode to the bit of `reference`. What has
no row is refused by name, and so is what a row does not have: a bias, a window, a rotary embedding of another kind.

{_markdown(table())}
Two products: where what comes out of attention and MLP is normalised before it is added to the residual, the plan
`fused` gets the products of both and joins them in the TEE. It takes as many rounds as for others; what comes down is
about twice as much, and so is what the server computes, and `auto` measures what that is worth. A `.gguf` file is
converted whole, or refused with the key or tensor that is not known. Of models of images and text
({", ".join(TEXT_OF)}) the text is computed; images are not taken.

Private modes refuse plans, whatever the model:

{_markdown(refused_plans())}
{_markdown(refused())}"""


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"

"""Attacks that read text: from token ids, from activations, from logits. None of them needs more than the weights, the
messages, and for the linear map a text that the attacker knows to have been sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from teegpu.audit.chance import matches
from teegpu.audit.findings import Finding
from teegpu.audit.known import PROMPT, TRAINING, Known, Truth
from teegpu.audit.reading import Entering, View

_RIDGE = 0.1
"""The penalty of the linear map, as a share of the mean variance of an input."""


def layers_attacked(layers: int) -> list[int]:
    """The layers whose input the linear map is tried on: near the beginning, in the middle, near the end."""
    return sorted({layer for layer in (1, layers // 2, layers - 2) if 0 < layer < layers})


def read_ids(view: View, truth: Truth) -> Finding:
    """Token ids, where the plan has the server look them up."""
    found = view.ids(PROMPT)
    if found is None:
        return _impossible("token ids", "requests", view, "no token id is sent")
    return _scored("token ids", "requests", view, found, truth.computed)


def nearest_embedding(view: View, known: Known, truth: Truth) -> Finding:
    """The input of layer 0 is an embedding, normalised: the nearest one is its token."""
    name, target = "nearest embedding", "layer 0, input of Q, K, V"
    entering = view.entering(PROMPT, 0)
    if (problem := _problem(entering, truth.computed)) is not None or entering is None:
        return _impossible(name, target, view, problem or "")
    guesses = known.nearest(entering.rows, known.norm(0))
    return _scored(name, target, view, guesses, truth.computed)


def linear_map(view: View, known: Known, truth: Truth, layer: int) -> Finding:
    """A linear map from rows that enter ``layer`` to embeddings, learnt on a text that the attacker knows (ridge
    regression, in closed form), then the nearest embedding."""
    name, target = "linear map", f"layer {layer}, input"
    learnt, attacked = view.entering(TRAINING, layer), view.entering(PROMPT, layer)
    problem = _problem(attacked, truth.computed) or _problem(learnt, truth.training)
    if problem is not None or learnt is None or attacked is None:
        return _impossible(name, target, view, problem or "")
    guesses = known.nearest(_regressed(_rows(learnt), known.embedded(truth.training), _rows(attacked)))
    finding = _scored(name, target, view, guesses, truth.computed)
    finding.detail = f"learnt from {len(truth.training):,} tokens of another text"
    return finding


def read_logits(view: View, known: Known, truth: Truth) -> Finding:
    """The likeliest token of each row that the server itself computed is the next one of the answer."""
    name, target = "likeliest token", "the logits, answered"
    rows = view.logits(PROMPT)
    if rows is None:
        return _impossible(name, target, view, "no logits are computed by the server")
    if rows.shape[0] != len(truth.answer):
        return _impossible(name, target, view, f"{rows.shape[0]} rows were answered, for {len(truth.answer)} tokens")
    values = rows.to(torch.float32)
    if rows.dtype == torch.int32:
        values = values * known.logit_scales()
    return _scored(name, target, view, values.argmax(-1).tolist(), truth.answer)


def read_everything(view: View, known: Known, truth: Truth) -> Iterable[Finding]:
    """All of them, on all layers that are attacked."""
    yield read_ids(view, truth)
    yield nearest_embedding(view, known, truth)
    for layer in layers_attacked(known.spec.layers):
        yield linear_map(view, known, truth, layer)
    yield read_logits(view, known, truth)


def _rows(entering: Entering) -> torch.Tensor:
    return torch.nn.functional.normalize(entering.rows.to(torch.float64), dim=-1)


def _regressed(inputs: torch.Tensor, targets: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """What the map from ``inputs`` (n, hidden) to ``targets`` (n, hidden) makes of ``asked`` (m, hidden)."""
    wanted = torch.nn.functional.normalize(targets.to(torch.float64), dim=-1)
    offset, middle = inputs.mean(0), wanted.mean(0)
    centred = inputs - offset
    gram = centred.t() @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-12)
    weights = torch.linalg.solve(gram, centred.t() @ (wanted - middle))
    return (asked - offset) @ weights + middle


def _problem(entering: Entering | None, tokens: list[int]) -> str | None:
    if entering is None:
        return "what enters the layer is not sent"
    if entering.rows.shape[0] != len(tokens):
        return f"{entering.rows.shape[0]} rows are sent, for {len(tokens)} tokens"
    return None


def _scored(attack: str, target: str, view: View, guesses: list[int], truth: list[int]) -> Finding:
    if len(guesses) != len(truth):
        return _impossible(attack, target, view, f"{len(guesses)} tokens were seen, of {len(truth)}")
    right, chance, probability = matches(guesses, truth)
    return Finding(
        attack,
        target,
        view.label,
        probability,
        right=right,
        total=len(truth),
        chance=chance,
        control=view.control,
        guesses=guesses,
    )


def _impossible(attack: str, target: str, view: View, why: str) -> Finding:
    return Finding(attack, target, view.label, None, why, control=view.control)

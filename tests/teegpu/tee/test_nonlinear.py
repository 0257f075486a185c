from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from teegpu.tee.nonlinear import apply_rotary, inverse_rms, rmsnorm, silu_product, softmax


def test_rmsnorm_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    for scale in (1e-4, 1.0, 1e4):
        x = torch.randn(5, 16) * scale
        torch.testing.assert_close(rmsnorm(x, norm.weight.detach(), 1e-5), norm(x).detach())
        torch.testing.assert_close(x * inverse_rms(x, 1e-5) * norm.weight, norm(x))


def test_a_row_of_zeros_has_a_finite_norm() -> None:
    assert rmsnorm(torch.zeros(2, 4), torch.ones(4), 1e-6).abs().max() == 0


def test_silu_product() -> None:
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    both = torch.cat((gate, up), dim=-1)
    out = silu_product(both)
    assert out.is_contiguous()
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)


def test_softmax_with_and_without_mask() -> None:
    scores = torch.randn(2, 3, 4)
    torch.testing.assert_close(softmax(scores.clone(), None), torch.softmax(scores, -1))
    mask = torch.tensor([[0.0, float("-inf"), 0.0, 0.0]]).expand(3, 4)
    out = softmax(scores.clone(), mask)
    assert out[..., 1].abs().max() == 0
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3))


def test_rotary_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 3, 8)
    angles = torch.rand(5, 4) * 6
    cos, sin = angles.cos(), angles.sin()
    full = (torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *full)
    got = apply_rotary(x, cos[:, None], sin[:, None])
    torch.testing.assert_close(got, want[0].transpose(0, 1))

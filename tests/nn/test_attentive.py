"""Attentive pooling by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mim_framework.nn.attentive import AIMPooling, CAEPooling, EfficientPooling, VJEPAPooling, attentive_head


def test_every_query_of_efficient_probing_reads_its_own_part_of_the_value():
    """Query 0 looks at the first token and query 1 at the second; the values are the tokens."""
    pool = EfficientPooling(4, num_queries=2)
    with torch.no_grad():
        pool.queries.copy_(1000 * torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        pool.v.weight.copy_(torch.eye(4))
    tokens = torch.tensor([[[1.0, 0.0, 3.0, 4.0], [0.0, 1.0, 5.0, 6.0]]])
    assert torch.allclose(pool(tokens), torch.tensor([[1.0, 0.0, 5.0, 6.0]]))


def test_the_zero_query_of_cae_looks_at_all_tokens_alike():
    pool = CAEPooling(8, num_heads=2)
    nn.init.zeros_(pool.q.bias)
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    values = pool.v(pool.norm_v(tokens)).mean(1)
    assert torch.allclose(pool(tokens), pool.proj(values), atol=1e-6)


@pytest.mark.parametrize("pool", [EfficientPooling(8, 4), CAEPooling(8, 2), VJEPAPooling(8, 2), AIMPooling(8, 2)])
def test_the_order_of_tokens_does_not_matter(pool: nn.Module):
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pool(tokens), pool(tokens[:, [3, 0, 4, 1, 2]]), atol=1e-5)


def test_first_weights_are_the_official_ones():
    torch.manual_seed(0)
    vjepa = attentive_head("vjepa", 64, 10, num_heads=4)
    assert vjepa.pool.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert vjepa.pool.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1)
    assert vjepa.pool.query.std().item() == pytest.approx(0.02, rel=0.3)
    assert isinstance(vjepa.norm, nn.Identity)
    assert not attentive_head("cae", 64, 10, num_heads=4).pool.query.any()
    eps = {name: attentive_head(name, 64, 10, num_heads=4).norm.eps for name in ("ep", "cae", "aim")}
    assert eps == {"ep": 1e-6, "cae": 1e-5, "aim": 1e-6}
    assert all(not attentive_head(name, 64, 10, num_heads=4).norm.affine for name in ("ep", "cae", "aim"))


def test_a_width_that_is_no_whole_number_of_queries_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="width 48 is not a multiple of num_queries 32; use num_queries=24"):
        EfficientPooling(48)

import math

import pytest
import torch

from elastic_hf.models.cpu_top_k import top_k_rows


@pytest.mark.parametrize("num_rows", [1, 4, 7, 24, 128])
@pytest.mark.parametrize("top_k", [1, 4])
def test_top_rows_are_those_of_topk(num_rows, top_k):
    """Whole groups, no whole groups and fewer groups than sought; many columns and few."""
    scores = torch.randn(3, num_rows, 300, generator=torch.Generator().manual_seed(0))
    top_k = min(top_k, num_rows)
    for columns in (300, 10):
        values, rows = top_k_rows(scores[..., :columns], top_k)
        expected, expected_rows = scores[..., :columns].topk(top_k, dim=-2)
        assert torch.equal(rows, expected_rows) and torch.equal(values, expected)


def test_top_rows_of_nan_exist():
    values, rows = top_k_rows(torch.full((3, 24, 300), math.nan), 4)
    assert values.isnan().all() and ((rows >= 0) & (rows < 24)).all()

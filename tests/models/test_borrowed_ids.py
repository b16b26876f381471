import pytest
import torch
import torch.nn.functional as F

import reference
from elastic_hf.models.borrowed_ids import NUM_NEAREST, borrow_ids


@pytest.mark.parametrize("num_rows", [2, 16])
@pytest.mark.parametrize("num_nearest", [1, 2, 5, 30])
def test_ids_are_borrowed_from_the_nearest_items(num_nearest, num_rows):
    generator = torch.Generator().manual_seed(0)
    new, known = (F.normalize(torch.randn(n, 5, generator=generator), dim=-1) for n in (7, 11))
    ids = torch.randn(11, 3, generator=generator)
    new[4] = 0  # nothing is known of it
    new[5] = -F.normalize(known.sum(dim=0), dim=-1)
    found = borrow_ids(new, known.split(num_rows), ids, num_nearest)
    torch.testing.assert_close(found, reference.borrow_ids(new, known, ids, num_nearest))
    assert not found[4].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end(dtype):
    generator = torch.Generator().manual_seed(0)
    new, known = (F.normalize(torch.randn(n, 5, generator=generator), dim=-1) for n in (7, 11))
    new[4] = 0  # whose sum has the length 0
    ids = torch.randn(11, 3, generator=generator).to(dtype)
    found = borrow_ids(new, [known], ids)
    assert found.dtype == torch.float32 and not found[4].any()
    torch.testing.assert_close(found, reference.borrow_ids(new, known, ids.float(), NUM_NEAREST))

"""Numbers that are not finite are seen wherever they are."""

import pytest
import torch

from quant.core.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 1000])
def test_one_number_is_enough(dtype, wrong, place):
    tensor = torch.linspace(-1, 1, 1001).to(dtype)
    assert all_finite(tensor) and all_finite(tensor.view(7, 11, 13)[:, ::2])
    tensor[place] = wrong
    assert not all_finite(tensor) and not all_finite(tensor.view(7, 11, 13).transpose(0, 2))


def test_what_holds_no_such_number():
    assert all_finite(torch.empty(0, 4)) and all_finite(torch.tensor([True])) and all_finite(torch.arange(3))
    assert all_finite(torch.full((3,), torch.finfo(torch.float32).max))

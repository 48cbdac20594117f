"""Rows of heads, against loops over what the library's modules do with them."""

import pytest
import torch

from models.family import separate_heads, stacked_heads


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (8, 4), (8, 2), (12, 4), (80, 20), (8, 0)])
def test_rows_that_are_rotated_together_stand_half_a_head_apart(head_dim, rotated, interleaved):
    layout = separate_heads("attn", "o", 4, 2, head_dim, rope=True).rotating(rotated, interleaved)
    partners = {}  # of a row, what a rotation of this kind mixes it with
    for i in range(rotated // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotated // 2)
        partners[a] = b
    for _, rows in (layout.q, layout.k):
        for head, listed in enumerate(rows.tolist()):
            own = [row - head * head_dim for row in listed]
            assert sorted(own) == list(range(head_dim)), "every row once"
            pairs = dict(zip(own[: head_dim // 2], own[head_dim // 2 :], strict=True))
            for a, b in partners.items():
                assert pairs[a] == b
    assert torch.equal(layout.v[1], torch.arange(2 * head_dim).view(2, head_dim)), "values stay in order"
    assert layout.repeats == 2 and layout.rope


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_stacked_rows_are_slices_of_the_fused_answer(heads, kv_heads):
    head_dim = 3
    layout = stacked_heads("qkv", "o", heads, kv_heads, head_dim, rope=False)
    answer = torch.randn((heads + 2 * kv_heads) * head_dim)
    q, k = heads * head_dim, kv_heads * head_dim
    for (linear, rows), part in zip((layout.q, layout.k, layout.v), answer.split((q, k, k)), strict=True):
        assert linear == "qkv" and torch.equal(answer[rows], part.view(-1, head_dim))

"""Small unsigned integers as one dense little-endian bit stream a row: code k sits at bit k·bits of its row.

32 codes take exactly ``bits`` words, so every stretch of 32 has the same layout. This is the layout of GPTQ's
``qweight`` (along its columns) and of compressed-tensors' ``weight_packed`` from version 0.18 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH = 32  # codes that start at a word's first bit again


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] in 0..2^bits - 1, of at most 31 bits, as int32 [rows, ceil(n·bits / 32)]; bits behind the last code are zero."""
    rows, n = codes.shape
    codes = codes.to(torch.int32)
    if n % STRETCH:
        codes = torch.nn.functional.pad(codes, (0, STRETCH - n % STRETCH))
    stretches = codes.view(rows, -1, STRETCH)
    words = torch.zeros(rows, stretches.shape[1], bits, dtype=torch.int32, device=codes.device)
    for k in range(STRETCH):
        word, offset = divmod(k * bits, 32)
        words[..., word] |= stretches[..., k] << offset
        if offset + bits > 32:
            words[..., word + 1] |= stretches[..., k] >> (32 - offset)
    return words.view(rows, -1)[:, : -(-n * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The codes [rows, n] of words int32 [rows, ceil(n·bits / 32)]."""
    rows, mask = words.shape[0], 2**bits - 1
    short = -words.shape[1] % bits
    stretches = torch.nn.functional.pad(words, (0, short)).view(rows, -1, bits)
    codes = torch.empty(rows, stretches.shape[1], STRETCH, dtype=dtype, device=words.device)
    for k in range(STRETCH):
        word, offset = divmod(k * bits, 32)
        values = stretches[..., word] >> offset
        if offset + bits > 32:
            low = 2 ** (32 - offset) - 1  # the shift has filled in the sign
            values = (values & low) | (stretches[..., word + 1] << (32 - offset))
        codes[..., k] = values & mask
    return codes.view(rows, -1)[:, :n].contiguous()


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit planes of codes [rows, n]: int32 [bits, rows, ceil(n / 32)], plane b holding bit b of 32 codes a word."""
    return torch.stack([pack((codes >> b) & 1, 1) for b in range(bits)])


def unpack_planes(planes: Tensor, n: int) -> Tensor:
    """The codes [rows, n], uint8, of bit planes int32 [bits, rows, ceil(n / 32)]."""
    codes = torch.zeros(planes.shape[1], n, dtype=torch.uint8, device=planes.device)
    for b, plane in enumerate(planes):
        codes |= unpack(plane, 1, n) << b
    return codes

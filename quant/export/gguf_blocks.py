"""The bytes of GGUF's blocks, of codes, scales and minima that are given: nothing is rounded here.

A block is 32 values with one scale, a super-block 256 with scales of its 8 or 16 parts, which are small integers times one
float16 number. (ggml-common.h and the reference quantization in ggml-quants.c; the inverse is `gguf.dequantize`.)
"""

from __future__ import annotations

import numpy as np

Bytes = np.ndarray  # uint8 [blocks, bytes of one]
BLOCK, SUPER = 32, 256
Q3_SCALE_OF_ONE, Q3_MIDDLE = 33, 4  # a scale of Q3_K is stored plus 32


def halves(numbers: np.ndarray) -> Bytes:
    """Numbers [blocks] that float16 holds, two bytes each. Raises ValueError where one is not held exactly."""
    with np.errstate(over="ignore"):
        half = numbers.astype("<f2")
    if not np.array_equal(half.astype(np.float32), numbers):
        raise ValueError("a scale or minimum is no float16 number")
    return half.view(np.uint8).reshape(-1, 2)


def q4(codes: np.ndarray, *head: Bytes) -> Bytes:
    """Q4_0 and Q4_1: what stands in front, then code j and j + 16 in a byte. codes: uint8 [blocks, 32] below 16."""
    return np.hstack([*head, codes[:, :16] | codes[:, 16:] << 4])


def q5(codes: np.ndarray, *head: Bytes) -> Bytes:
    """Q5_0 and Q5_1: the fifth bits of all 32 codes, then the others as above. codes: uint8 [blocks, 32] below 32."""
    return q4(codes & 15, *head, np.packbits(codes >> 4, axis=1, bitorder="little"))


def q8(codes: np.ndarray, *head: Bytes) -> Bytes:
    """Q8_0, whose values are signed. codes: uint8 [blocks, 32], plus 128."""
    return np.hstack([*head, codes ^ 128])


def q2_k(codes: np.ndarray, d: Bytes, dmin: Bytes, scales: np.ndarray, minima: np.ndarray) -> Bytes:
    """Q2_K. codes: uint8 [blocks, 256] below 4; scales, minima: uint8 [blocks, 16] below 16."""
    return np.hstack([scales | minima << 4, _in_fours(codes), d, dmin])


def q3_k(codes: np.ndarray, d: Bytes, scales: np.ndarray) -> Bytes:
    """Q3_K. codes: uint8 [blocks, 256] below 8; scales: uint8 [blocks, 16], plus 32."""
    quarters = (scales >> 4).reshape(-1, 4, 4)  # the two bits above of scales i, i + 4, i + 8, i + 12 share a byte
    above = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
    low = scales & 15
    return np.hstack([_planes(codes >> 2), _in_fours(codes & 3), low[:, :8] | low[:, 8:] << 4, above, d])


def q4_k(codes: np.ndarray, d: Bytes, dmin: Bytes, scales: np.ndarray, minima: np.ndarray) -> Bytes:
    """Q4_K. codes: uint8 [blocks, 256] below 16; scales, minima: uint8 [blocks, 8] below 64."""
    return np.hstack([d, dmin, _six_bits(scales, minima), _in_pairs(codes)])


def q5_k(codes: np.ndarray, d: Bytes, dmin: Bytes, scales: np.ndarray, minima: np.ndarray) -> Bytes:
    """Q5_K. codes: uint8 [blocks, 256] below 32; scales, minima: uint8 [blocks, 8] below 64."""
    return np.hstack([d, dmin, _six_bits(scales, minima), _planes(codes >> 4), _in_pairs(codes & 15)])


def q6_k(codes: np.ndarray, d: Bytes, scales: np.ndarray) -> Bytes:
    """Q6_K. codes: uint8 [blocks, 256] below 64; scales: int8 [blocks, 16]."""
    parts = codes.reshape(-1, 2, 4, 32)
    low = (parts[:, :, :2] & 15) | (parts[:, :, 2:] & 15) << 4
    return np.hstack([low.reshape(-1, 128), _in_fours(codes >> 4), scales.view(np.uint8), d])


def _in_fours(codes: np.ndarray) -> Bytes:
    """Codes of 2 bits: four that are 32 apart share a byte, in each half of a super-block."""
    parts = codes.reshape(-1, 2, 4, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6).reshape(-1, 64)


def _in_pairs(codes: np.ndarray) -> Bytes:
    """Codes of 4 bits: two that are 32 apart share a byte."""
    parts = codes.reshape(-1, 4, 2, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(-1, 128)


def _planes(bits: np.ndarray) -> Bytes:
    """Single bits: eight that are 32 apart share a byte."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> Bytes:
    """Eight scales and eight minima in 12 bytes: of the last four, two bits stand above the first four."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.hstack([first, second, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4])

"""Codes of 1 to 8 bits in as many bits, out of which onnxruntime makes indices at load.

A code is split into *planes* of 4, 2 and 1 bits, ``q = Σ p_i · 2^{s_i}`` (6 bits: 4 + 2). A plane
is stored as a 4-bit tensor where the opset has them (21), and otherwise with ``m = 8 / width``
codes in a byte,

    byte_l = Σ_i p_{i L + l} · 2^{i width},    l < L = ⌈n / m⌉

which ``Mod(Div(byte, 2^{i width}), 2^width)`` takes apart: arithmetic on constants, that the
runtime folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]

NIBBLE_OPSET = 21
"""The first opset with 4-bit tensors."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Some of the bits of every code.

    Attributes:
        shift: Place of its lowest bit in the code.
        width: Bits: 1, 2, 4 or 8.
    """

    shift: int
    width: int

    def of(self, codes: Codes) -> Codes:
        """Its bits of ``codes``, of the same shape."""
        mask = np.uint8((1 << self.width) - 1)
        return np.bitwise_and(np.right_shift(codes, np.uint8(self.shift)), mask)

    def packed(self, codes: Codes) -> Codes:
        """Its bits in bytes, [1, L]."""
        return packed_digits(self.of(codes), 1 << self.width)


def planes(bits: int, *, whole_bytes: bool = False) -> tuple[Plane, ...]:
    """The planes of codes of ``bits`` bits, the highest first.

    Args:
        bits: 1 to 8.
        whole_bytes: One plane of 8 bits.
    """
    if whole_bytes or bits == 8:
        return (Plane(0, 8),)
    return tuple(Plane(bits % width, width) for width in (4, 2, 1) if bits & width)


def digits_per_byte(base: int) -> int:
    """Codes below ``base`` that fit a byte: the largest ``m`` with ``base^m <= 256``.

    Five codes of three values take a byte, 1.6 bits each.
    """
    m = 1
    while base ** (m + 1) <= 256:
        m += 1
    return m


def packed_digits(codes: Codes, base: int) -> Codes:
    """Codes below ``base`` as the digits of bytes, ``byte_l = Σ_i q_{i L + l} base^i``, [1, L].

    Args:
        codes: Of any shape, taken in order.
        base: 2 to 256.
    """
    flat, m = codes.ravel(), digits_per_byte(base)
    filled = np.concatenate([flat, np.zeros(-len(flat) % m, np.uint8)]).reshape(m, -1)
    places = (base ** np.arange(m)).astype(np.uint8)[:, None]
    return np.asarray((filled * places).sum(axis=0, keepdims=True, dtype=np.uint8))


def bits_for(count: int) -> int:
    """Bits of a code that tells ``count`` values apart, at least 1."""
    return max((count - 1).bit_length(), 1)


def stored_bytes(elements: int, bits: int, *, whole_bytes: bool = False) -> int:
    """Bytes of the codes of a tensor."""
    return sum(-(-elements * p.width // 8) for p in planes(bits, whole_bytes=whole_bytes))

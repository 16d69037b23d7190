"""The checksum of TFRecord files, which neither TensorFlow nor the standard library offers to Python.

A byte's part in the checksum depends on its value and on how many bytes follow it, and the parts are combined
by exclusive or: with a table for each place in a block, NumPy looks up the bytes of all blocks at once.
Source: RFC 3720, B.4 (the polynomial and its test values); TensorFlow's lib/hash/crc32c.h (the mask).
"""

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["masked_crc32c"]

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, lowest bit first
_MASK_DELTA = 0xA282EAD8
_BLOCK_BYTES = 512  # the tables then fill half a megabyte, which stays in the processor's cache
_FEW_BYTES = 64  # up to here a plain loop is faster


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C of `data`, rotated and shifted as TFRecord files store it."""
    crc = _crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    if len(data) <= _FEW_BYTES:
        table = _columns()[-1]
        for byte in data:
            crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
        return crc ^ 0xFFFFFFFF

    # Zeros ahead of the data change nothing once what the state would add to it is in the data itself.
    padding = -len(data) % _BLOCK_BYTES
    padded = np.zeros(padding + len(data), np.uint8)
    padded[padding:] = np.frombuffer(data, np.uint8)
    padded[padding : padding + 4] ^= 0xFF
    blocks = padded.reshape(-1, _BLOCK_BYTES)
    places = np.arange(_BLOCK_BYTES) * 256
    first, second, third, fourth, _ = _columns()
    crc = 0
    for block_crc in np.bitwise_xor.reduce(_tables().ravel()[blocks + places], axis=1).tolist():
        crc = (
            first[crc & 0xFF]
            ^ second[crc >> 8 & 0xFF]
            ^ third[crc >> 16 & 0xFF]
            ^ fourth[crc >> 24]
            ^ block_crc
        )
    return crc ^ 0xFFFFFFFF


@cache
def _tables() -> npt.NDArray[np.uint32]:
    """uint32 [_BLOCK_BYTES, 256]: what a byte in each place of a block adds to the block's checksum."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, last >> 1 ^ np.uint32(_POLYNOMIAL), last >> 1).astype(np.uint32)
    tables = np.empty((_BLOCK_BYTES, 256), np.uint32)
    tables[-1] = last
    for place in range(_BLOCK_BYTES - 2, -1, -1):
        tables[place] = tables[place + 1] >> 8 ^ last[tables[place + 1] & 0xFF]
    return tables


@cache
def _columns() -> tuple[list[int], ...]:
    """The tables of a block's first four places and of its last, as lists, which are faster one by one."""
    return tuple(_tables()[place].tolist() for place in (0, 1, 2, 3, -1))

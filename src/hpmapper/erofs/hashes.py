"""The two small hashes of the format. Slow in Python, but one runs over a single block and one over few names."""

from __future__ import annotations

from functools import cache

_U32 = 0xFFFFFFFF
_PRIMES = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
_CASTAGNOLI = 0x82F63B78


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """CRC-32C as EROFS wants it: starts from ones, *without* the usual inversion at the end."""
    crc, table = _U32, _crc_table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def xxh32(data: bytes, seed: int) -> int:
    """XXH32 of a short name."""
    p1, p2, p3, p4, p5 = _PRIMES
    rest = len(data) & ~15
    if rest:
        total = _stripes(data[:rest], seed)
    else:
        total = seed + p5
    total += len(data)
    words = len(data) & ~3
    for at in range(rest, words, 4):
        total = _rotate(total + int.from_bytes(data[at : at + 4], "little") * p3, 17) * p4
    for byte in data[words:]:
        total = _rotate(total + byte * p5, 11) * p1
    total &= _U32
    total = (total ^ total >> 15) * p2 & _U32
    total = (total ^ total >> 13) * p3 & _U32
    return total ^ total >> 16


def _stripes(data: bytes, seed: int) -> int:
    p1, p2 = _PRIMES[:2]
    lanes = [seed + p1 + p2, seed + p2, seed, seed - p1]
    for at in range(0, len(data), 16):
        for lane in range(4):
            word = int.from_bytes(data[at + 4 * lane : at + 4 * lane + 4], "little")
            lanes[lane] = _rotate(lanes[lane] + word * p2, 13) * p1
    return sum(_rotate(lane, turn) for lane, turn in zip(lanes, (1, 7, 12, 18), strict=True))


def _rotate(value: int, bits: int) -> int:
    value &= _U32
    return (value << bits | value >> 32 - bits) & _U32

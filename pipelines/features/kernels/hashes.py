"""XXH3 of many short strings in one call."""

from __future__ import annotations

import numpy as np

from pipelines.features.kernels.compiled import compiled, inner

SHORTEST, LONGEST = 17, 128  # bytes of a string: others are hashed by rules of their own

# The first words of XXH3's default secret.
SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    ),
    np.uint64,
)
_LENGTH = np.uint64(0x9E3779B185EBCA87)
_AVALANCHE = np.uint64(0x165667919E3779F9)
_LOW, _HALF, _37 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(37)


@inner
def _mix(first: np.uint64, second: np.uint64) -> np.uint64:
    """Both halves of the product of 128 bits, folded into one."""
    low, high, other_low, other_high = first & _LOW, first >> _HALF, second & _LOW, second >> _HALF
    lowest, cross = low * other_low, high * other_low
    middle = (lowest >> _HALF) + (cross & _LOW) + low * other_high
    return ((cross >> _HALF) + (middle >> _HALF) + high * other_high) ^ ((middle << _HALF) | (lowest & _LOW))


@compiled
def xxh3(words: np.ndarray, offsets: np.ndarray, secret: np.ndarray, hashes: np.ndarray) -> None:
    """The hashes, uint64[n], of those strings that have ``SHORTEST`` to ``LONGEST`` bytes; others stay as they are.

    ``words`` uint64[b - 7] has the eight bytes that begin at every byte of the text, whose string i has the bytes
    [offsets[i], offsets[i + 1]). (XXH3 of 64 bits with seed 0, https://xxhash.com.)
    """
    for i in range(hashes.shape[0]):
        begin, end = offsets[i], offsets[i + 1]
        length = end - begin
        if length < SHORTEST or length > LONGEST:
            continue
        acc = np.uint64(length) * _LENGTH
        for part in range((length - 1) // 32, -1, -1):
            front, back = begin + 16 * part, end - 16 * part - 16
            acc += _mix(words[front] ^ secret[4 * part], words[front + 8] ^ secret[4 * part + 1])
            acc += _mix(words[back] ^ secret[4 * part + 2], words[back + 8] ^ secret[4 * part + 3])
        acc ^= acc >> _37
        acc *= _AVALANCHE
        hashes[i] = acc ^ (acc >> _HALF)

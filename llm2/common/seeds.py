"""Random numbers that depend on names, not on batch layout.

A sequence's seed hashes what the sequence is (problem, position, token, index); the uniform for its t-th token hashes
seed and t. So a sample is the same in any batch, after a resume, and on any rank.
"""

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the increment and multipliers of SplitMix64 (Steele et al., 2014), as int64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def row_seed(*names: object) -> int:
    """A seed in [-2**63, 2**63), the hash of `names`."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1): seeds (B,) and steps (B,), int64 -> (B,) float32."""
    mixed = seeds + (steps + 1) * _GOLDEN  # int64 wraps around, as SplitMix64 needs
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shift_right(mixed, 31)
    return _shift_right(mixed, 40).float() / 2**24  # 24 bits: as many as float32 holds exactly


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

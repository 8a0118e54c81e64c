"""Seeds as pure functions of their purpose, so randomness depends on no rank, worker or restart."""

from __future__ import annotations

import hashlib

import torch

_SEED_MASK = (1 << 63) - 1


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """Mixes the run's seed, a purpose and any number of keys into one seed.

    Args:
        seed: The run's seed (`args.seed`).
        purpose: Purpose of the randomness, e.g. `noise`; other purposes give unrelated seeds.
        keys: Keys within that purpose, e.g. the global sample index.

    Returns:
        An integer in `[0, 2**63)`, the same on every machine and in every version of Python.
    """
    text = "\x1f".join([str(int(seed)), purpose, *(str(int(key)) for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_MASK


def derive_generator(
    seed: int, purpose: str, *keys: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Returns a new generator seeded with `derive_seed(seed, purpose, *keys)`.

    Args:
        device: Device on which numbers are drawn. Only the CPU gives the same numbers on every machine.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *keys))

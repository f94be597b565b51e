"""A fingerprint of a model's weights: equal for equal bits, cheap on any device, the same on all of them."""

import hashlib

import torch
from torch import Tensor

from thyme.model.model import Model

_CHUNK = 1 << 22
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: the golden ratio's bits
_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(model: Model) -> str:
    """A hex digest of every parameter's name, shape, dtype and bits. It tells states of one model apart; it is no proof
    against somebody who makes two on purpose."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_sum_of_bits(parameter)}\n".encode())
    return digest.hexdigest()


def _sum_of_bits(parameter: Tensor) -> int:
    """Of the elements as integers, each times a number of its place, modulo 2^64: in integers any order gives the same
    sum."""
    bits = parameter.detach().contiguous().view(_VIEWS[parameter.element_size()]).flatten()
    total = 0
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), device=part.device) * _ODD | 1
        total += int((part * places).sum())
    return total % 2**64

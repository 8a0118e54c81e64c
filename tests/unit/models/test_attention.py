"""The kernel of attention: what is preferred where, and that the choice reaches the transformer."""

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sat_train.config import ArgsConfig
from sat_train.errors import ConfigError
from sat_train.models.attention import attention_kernels, preferred_kernels
from tests.unit.models.narrow import inputs, randomized

CPU = torch.device("cpu")
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("choice", "capability", "deterministic", "first"),
    [
        ("auto", HOPPER, False, SDPBackend.CUDNN_ATTENTION),
        ("auto", HOPPER, True, SDPBackend.FLASH_ATTENTION),
        ("auto", AMPERE, False, SDPBackend.FLASH_ATTENTION),
        ("auto", None, False, SDPBackend.FLASH_ATTENTION),
        ("flash", HOPPER, False, SDPBackend.FLASH_ATTENTION),
        ("cudnn", AMPERE, False, SDPBackend.CUDNN_ATTENTION),
        ("math", HOPPER, False, SDPBackend.MATH),
    ],
)
def test_the_preferred_kernel_depends_on_the_card(choice, capability, deterministic, first):
    kernels = preferred_kernels(choice, capability, deterministic=deterministic)
    assert kernels[0] == first
    assert kernels[-1] == SDPBackend.MATH, "a shape that no other kernel serves still runs"


@pytest.mark.parametrize("choice", ["cudnn", "fa3"])
def test_a_kernel_of_gpus_is_refused_on_a_cpu(choice):
    with pytest.raises(ConfigError, match=r"args\.attention = .*auto, flash or math"):
        attention_kernels(ArgsConfig(attention=choice), CPU)


class FlashCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "flash_attention" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_the_choice_holds_in_forward_backward_and_what_is_recomputed():
    gradients = {}
    for choice, expected in (("math", 0), ("auto", 2 * 3)):
        dit = randomized(layers=2, recompute="full")
        with attention_kernels(ArgsConfig(attention=choice), CPU), FlashCalls() as calls:
            dit(*inputs()).square().sum().backward()
        assert calls.count == expected
        gradients[choice] = dit.time_embed[0].weight.grad
    torch.testing.assert_close(gradients["math"], gradients["auto"], rtol=1e-3, atol=1e-4)

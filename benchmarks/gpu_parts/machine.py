"""The machine: versions, collectives, and the kernel that computes attention."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_parts.check import Check, Finding, Setting, at_most, recognized, seconds_of, within
from sat_train.config import ArgsConfig
from sat_train.distributed.collectives import max_flags
from sat_train.engine.compilation import reason_without_c
from sat_train.models.attention import attention_kernels

_CUDNN_WITH_HALF_CONV3D = 91500
_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_SIZES = {"2b": (30, 17776), "5b": (48, 17776), "1.5": (48, 45104)}
_HEAD_WIDTH = 64
_LENGTHS = (215, 192, 208)  # 87, 64 and 80 beyond a multiple of 128, where kernels take other paths


def environment(setting: Setting) -> Iterator[Finding]:
    """Yields versions, memory and what Triton needs."""
    yield Finding("torch", torch.__version__)
    if not setting.on_gpu:
        return
    yield Finding("C compiler for Triton", reason_without_c() or "there", "there", not reason_without_c())
    device = setting.mesh.device
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    card, capability = recognized(name, memory / 2**30), torch.cuda.get_device_capability(device)
    yield Finding("card", name, card.name if card else "h100, which is assumed", card is not None)
    yield within("its memory, GiB", memory / 2**30, setting.card.memory_gib, least=0.9, most=1.1)
    yield Finding("capability", ".".join(map(str, capability)), ">= 8.0 for bf16", capability >= (8, 0))
    yield Finding("driver", _driver())
    version = torch.backends.cudnn.version() or 0
    enough = version >= _CUDNN_WITH_HALF_CONV3D
    yield Finding("cuDNN", str(version), f">= {_CUDNN_WITH_HALF_CONV3D}", enough)
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    shared = shutil.disk_usage("/dev/shm").free / 1e9
    yield Finding("/dev/shm, GB", shared, ">= 1", shared >= 1)
    yield Finding("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "unset"))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def collectives(setting: Setting) -> Iterator[Finding]:
    """Yields the time of the first collective, which starts NCCL, and of later ones."""
    flags = torch.ones(2, device=setting.mesh.device)
    first, later = (seconds_of(setting, lambda: max_flags(setting.mesh, flags), repeats=n) for n in (1, 5))
    limits = (20.0, 5.0) if setting.on_gpu else (math.inf, math.inf)
    yield at_most("first collective, s", first, limits[0])
    yield at_most("a later one, ms", later * 1e3, limits[1])


def attention(setting: Setting) -> Iterator[Finding]:
    """Yields which kernel is taken, its errors, and the rates of each."""
    kernels = _KERNELS if setting.on_gpu else {"flash": SDPBackend.FLASH_ATTENTION}
    yield _kernel_by_default(setting)
    for name, kernel in kernels.items():
        with sdpa_kernel(kernel):
            worst = max(_error(setting, length) for length in _LENGTHS)
        yield at_most(f"{name}: error of outputs and gradients", worst, 0.02)
    if setting.on_gpu:
        for size, (heads, length) in _SIZES.items():
            yield from _rates(setting, size, heads, length)


def _inputs(setting: Setting, heads: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns q and k, which are contiguous in a block, and v, a slice of the fused projection."""
    generator = torch.Generator(setting.mesh.device).manual_seed(length)
    size = (1, length, 3, heads, _HEAD_WIDTH)
    fused = torch.randn(size, device=setting.mesh.device, dtype=dtype, generator=generator)
    q, k, v = (part.transpose(1, 2) for part in fused.unbind(2))
    return q.contiguous().requires_grad_(), k.contiguous().requires_grad_(), v.requires_grad_()


def _kernel_by_default(setting: Setting) -> Finding:
    q, k, v = _inputs(setting, 2, 208, torch.bfloat16)
    with attention_kernels(ArgsConfig(), setting.mesh.device):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.grad_fn is not None, "the inputs need gradients"
    is_hopper = setting.on_gpu and torch.cuda.get_device_capability(setting.mesh.device) == (9, 0)
    expected = "Cudnn" if is_hopper else "Flash"
    name = out.grad_fn.name().removeprefix("ScaledDotProduct").removesuffix("AttentionBackward0")
    return Finding("kernel of args.attention=auto", name, expected, expected in name)


def _error(setting: Setting, length: int) -> float:
    """Returns the largest relative error of output and gradients against fp32."""
    half = _inputs(setting, 3, length, torch.bfloat16)
    whole = tuple(each.detach().float().requires_grad_() for each in half)
    results = []
    for inputs, kernel in ((half, None), (whole, SDPBackend.MATH)):
        with sdpa_kernel(kernel) if kernel else torch.enable_grad():
            out = F.scaled_dot_product_attention(*inputs)
            out.float().square().sum().backward()
        results.append([out.detach(), *(each.grad for each in inputs)])
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def _rates(setting: Setting, size: str, heads: int, length: int) -> Iterator[Finding]:
    seconds, card = {}, setting.card
    for name, kernel in _KERNELS.items():
        q, k, v = _inputs(setting, heads, length, torch.bfloat16)
        with sdpa_kernel(kernel):
            forward, both = _times(setting, lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
        seconds[name] = both
        flops = 4 * length**2 * heads * _HEAD_WIDTH / 1e12
        yield Finding(f"{size}, {name}: forward, TFLOP/s", flops / forward)
        yield Finding(f"{size}, {name}: backward, TFLOP/s", 2.5 * flops / (both - forward))
    if torch.cuda.get_device_capability(setting.mesh.device) == (9, 0):
        faster = seconds["flash"] / seconds["cudnn"]
        yield within(f"{size}, cudnn over flash", faster, 1.2, least=1, most=math.inf)
    planned = flops / card.attention_tflops + 2.5 * flops / card.attention_backward_tflops
    yield within(f"{size}, best kernel, s", min(seconds.values()), planned, least=0.7, most=1.2)


def _times(setting: Setting, run: Callable[[], Tensor]) -> tuple[float, float]:
    def forward_and_backward() -> None:
        out = run()
        out.backward(torch.ones_like(out))

    forward_and_backward()  # warms up
    return seconds_of(setting, run, repeats=5), seconds_of(setting, forward_and_backward, repeats=5)


CHECKS = (
    Check("env", 0.1, "versions, memory, and what compilation needs", environment),
    Check("collectives", 0.1, "NCCL starts, and answers", collectives),
    Check("attention", 0.5, "which kernel runs, how exactly and how fast", attention),
)

"""The gradient's norm at stage 0 has the bits that DeepSpeed's later stages give it."""

import torch

from sat_train.engine.undivided import UndividedParameters


def test_the_norm_is_summed_in_float64():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((300, 200), (), (70,), (0, 3), (99, 50))]
    gradients[-1] = gradients[-1].T
    parameters = [torch.zeros_like(each).requires_grad_() for each in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = UndividedParameters(torch.optim.SGD(parameters, lr=0.0), parameters, max_norm=0.0)
    norms = []
    read = optimizer.read.norms
    optimizer.read.norms = lambda on_device: norms.extend(on_device) or read(on_device)
    optimizer.step()
    expected = torch.stack([gradient.double().norm(2) for gradient in gradients])
    assert torch.equal(norms[0], expected.square().sum().float().sqrt())

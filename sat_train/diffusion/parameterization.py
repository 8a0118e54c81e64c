"""Conversions between noisy latent, noise, clean latent and velocity at one noise level.

With `alpha = sqrt(alpha_bar)` and `sigma = sqrt(1 - alpha_bar)`:

    x_t = alpha x0 + sigma eps          v = alpha eps - sigma x0

Here `x0`, `eps`, `v` and `x_t` are float tensors of any one shape (b, ...), and `alpha_bar` is a float64
tensor that is either a scalar or of shape (b,). Coefficients are computed in float64 and applied in the
dtype of the latents.

Source: Salimans & Ho 2022 (arXiv:2202.00512) appendix D.
"""

from __future__ import annotations

from torch import Tensor


def _coefficients(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)`, shaped to multiply `like`."""
    shape = alpha_bar.shape + (1,) * (like.ndim - alpha_bar.ndim)
    alpha = alpha_bar.sqrt().to(like).reshape(shape)
    sigma = (1.0 - alpha_bar).sqrt().to(like).reshape(shape)
    return alpha, sigma


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the noisy latent `x_t`."""
    alpha, sigma = _coefficients(alpha_bar, x0)
    return alpha * x0 + sigma * eps


def v_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the velocity that the network learns to predict from `x_t`."""
    alpha, sigma = _coefficients(alpha_bar, x0)
    return alpha * eps - sigma * x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the clean latent that a velocity at `x_t` implies."""
    alpha, sigma = _coefficients(alpha_bar, x_t)
    return alpha * x_t - sigma * v


def eps_from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the noise that a velocity at `x_t` implies."""
    alpha, sigma = _coefficients(alpha_bar, x_t)
    return alpha * v + sigma * x_t

"""What the denoiser of weights is good for: generating matrices, and initial weights of networks."""

import math

import torch
from torch import Tensor, nn

from universal.signatures.denoising import Denoiser, load_denoiser

HIGHEST, LOWEST = 5.0, 0.05  # deviations of the noise between which matrices are generated


@torch.no_grad()
def generate(denoiser: Denoiser, rows: int, columns: int, count: int = 1, seed: int = 0, steps: int = 32) -> Tensor:
    """Matrices [count, rows, columns] of a mean square of 1, from noise, in `steps` denoisings.

    Euler's steps at the noise levels of Karras et al. (2022, equation 5), after each of which half of the noise is
    drawn anew, which undoes what earlier steps got wrong.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    x = math.sqrt(1 + HIGHEST**2) * torch.randn(count, rows, columns, generator=generator).to(device)
    sigmas = torch.linspace(HIGHEST ** (1 / 7), LOWEST ** (1 / 7), steps).double().pow(7).tolist()
    for sigma, lower in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        clean = denoiser(x, sigma)
        fresh = torch.randn(x.shape, generator=generator).to(device)
        x = clean + lower / math.sqrt(2) * ((x - clean) / sigma + fresh)
    return x / x.square().mean((1, 2), keepdim=True).sqrt()


@torch.no_grad()
def initialise(module: nn.Module, seed: int = 0, denoiser: Denoiser | None = None, steps: int = 32) -> nn.Module:
    """Initial weights for `module`, in place, as trained ones are: generated matrices at Kaiming's deviation.

    Vectors are left as they are, and so are weights whose matrix has fewer than 2 rows or columns.
    """
    denoiser = denoiser or load_denoiser()
    for number, parameter in enumerate(module.parameters()):
        if parameter.dim() < 2 or min(parameter.flatten(1).shape) < 2:
            continue
        rows, columns = parameter.flatten(1).shape
        matrix = generate(denoiser, rows, columns, seed=seed * 1000 + number, steps=steps)[0]
        parameter.copy_((matrix * math.sqrt(2 / columns)).view(parameter.shape))
    return module

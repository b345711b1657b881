"""What the tests of fitting share: a problem with a known ratio, quick options, a caller's own network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refine_ext.fit import fit_discriminator


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small problems: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussians(n: int, *, shift: float = 0.8, width: int = 2, seed: int = 0):
    """Real N(shift e_1, I), generated N(0, I): log r(x) = shift x_1 - shift^2 / 2."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, width, generator=generator)
    real[:, 0] += shift
    fake = torch.randn(n, width, generator=generator)
    return real, fake


def fit(real, fake, **options):
    return fit_discriminator(real, fake, **{"progress": False, "max_epochs": 40, **options})


class Small(nn.Module):
    """A caller's own network, with dropout, for images of 2 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)

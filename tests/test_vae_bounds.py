"""The VAE's bound against a linear-Gaussian VAE's closed forms; its errors; what encoders and decoders may return."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exchanged import Exchanged
from torch import nn
from vae_reference import LinearVAE

import refine_ext as rx

LINEAR = LinearVAE.random(pixels=6, latents=3, scale=0.5, seed=0)
OTHER = LINEAR.other_decoder(seed=1)
X = LINEAR.sample(400, seed=2)
GAUSSIAN = {"likelihood": "gaussian", "seed": 0}


def linear_bound(x=X, **options):
    arguments = {**GAUSSIAN, "auxiliary_decoder": OTHER.decoder(), **options}
    return rx.vae_bound(LINEAR.encoder(), LINEAR.decoder(), x, **arguments)


def truth(x=X, rho=1.0, m=None, prior=False):
    """Every term of the samples x in closed form."""
    reconstruction, rate = LINEAR.reconstruction(x).mean(), LINEAR.rate(x).mean()
    information = LINEAR.information(x, OTHER, prior=prior).mean()
    generator = (1 + rho) * math.sqrt(information / (m or len(x)))
    return {
        "reconstruction": reconstruction,
        "rate": rate,
        "mutual_information": information,
        "encoder_term": (1 + rho) * math.sqrt(rate),
        "generator_term": generator,
        "bound": reconstruction + (1 + rho) * math.sqrt(rate) + generator,
        "earlier_bound": reconstruction + math.sqrt(rate),
        "likelihood_gap": LINEAR.gap(x, OTHER).mean(),
    }


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_every_term_is_the_closed_form(rho):
    """Within 4.5 standard errors over latents (of the 14 terms of both parameters one in 1e4 would be outside)."""
    bound, want = linear_bound(rho=rho, draws=64, num_training=300), truth(rho=rho, m=300)
    for name in ("reconstruction", "mutual_information", "bound", "generator_term", "earlier_bound"):
        error = bound.monte_carlo_stderr[name]
        assert abs(getattr(bound, name) - want[name]) < 4.5 * error, name
        assert error < 0.02 * abs(want[name])
    assert bound.rate == pytest.approx(want["rate"], rel=1e-12)
    assert bound.encoder_term == pytest.approx(want["encoder_term"], rel=1e-12)
    assert bound.monte_carlo_stderr["rate"] == 0.0
    assert bound.likelihood_gap == pytest.approx(want["likelihood_gap"], rel=0.05)
    assert bound.elbo == pytest.approx(-bound.reconstruction - bound.rate)
    assert bound.bound == pytest.approx(bound.reconstruction + bound.encoder_term + bound.generator_term)


def test_standard_errors_are_those_of_repetitions():
    """Over latents, the samples fixed: 120 seeds; over samples too: 120 samples of 60. A deviation of 120 values is
    uncertain by 6.5%: 25% is nearly four of those."""
    names = ("reconstruction", "mutual_information", "generator_term", "bound", "earlier_bound")
    runs = [linear_bound(X[:60], seed=seed, draws=4) for seed in range(120)]
    for name in names:
        spread = np.std([getattr(run, name) for run in runs], ddof=1)
        assert np.mean([run.monte_carlo_stderr[name] for run in runs]) == pytest.approx(spread, rel=0.25), name
    samples = LINEAR.sample(60 * 120, seed=3).reshape(120, 60, -1)
    runs = [linear_bound(x, seed=seed, draws=2) for seed, x in enumerate(samples)]
    for name in (*names, "rate", "encoder_term", "likelihood_gap"):
        spread = np.std([getattr(run, name) for run in runs], ddof=1)
        assert np.mean([run.stderr[name] for run in runs]) == pytest.approx(spread, rel=0.25), name


def test_latents_of_the_prior():
    """What the decoders differ by where the model generates is not what they differ by at the codes."""
    bound, want = linear_bound(latents="prior", draws=64), truth(prior=True)
    error = bound.stderr["mutual_information"]
    assert abs(bound.mutual_information - want["mutual_information"]) < 4.5 * error
    assert abs(want["mutual_information"] - truth()["mutual_information"]) > 10 * error
    assert bound.likelihood_gap == linear_bound(draws=64).likelihood_gap


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized_logistic"])
def test_no_information_between_equal_decoders(likelihood):
    encoder, decoder = nn.Linear(5, 4), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randint(2, (20, 5)).float()
    bound = rx.vae_bound(encoder, decoder, x, likelihood=likelihood, auxiliary_decoder=decoder, seed=0)
    assert bound.mutual_information == bound.generator_term == bound.likelihood_gap == 0.0
    assert bound.stderr["generator_term"] == 0.0
    assert bound.bound == pytest.approx(bound.reconstruction + 2 * math.sqrt(bound.rate))
    other = rx.vae_bound(encoder, decoder, x, likelihood=likelihood, auxiliary_decoder=nn.Linear(2, 5), seed=0)
    assert other.mutual_information > 0


def test_a_decoder_of_other_samples_gives_an_upper_estimate():
    """Decoders that are the mean of their m = 10 normal samples: p_S = N(mean, I), the average decoder
    N(0, (1 + 1/m) I), so that I(x; S | z) = D/2 log(1 + 1/m). MI by another sample's decoder is D / m on average, an
    upper estimate. (A decoder trained on the same samples is the same one: 0.) 400 repetitions, 4.5 of their errors."""
    m, pixels, found = 10, 3, []
    x = torch.zeros(2, pixels, dtype=torch.float64)
    samples = torch.randn(400, 2, m, pixels, dtype=torch.float64).mean(2)

    def decoder(mean):
        return lambda z: mean.expand(len(z), pixels)

    for own, other in samples:
        options = {"likelihood": "gaussian", "draws": 1, "seed": 0}
        bound = rx.vae_bound(
            lambda x: torch.zeros(2, 2).double(), decoder(own), x, auxiliary_decoder=decoder(other), **options
        )
        found.append(bound.mutual_information)
    error = np.std(found, ddof=1) / 20
    assert np.mean(found) == pytest.approx(pixels / m, abs=4.5 * error)
    assert np.mean(found) - 4.5 * error > pixels / 2 * math.log(1 + 1 / m)


def test_a_posterior_equal_to_the_prior():
    """RATE = 0 exactly, and roots without a standard error of NaN."""
    bound = rx.vae_bound(lambda x: torch.zeros(len(x), 4), nn.Linear(2, 3), torch.rand(10, 3), seed=0)
    assert bound.rate == bound.encoder_term == 0.0 and bound.stderr["encoder_term"] == 0.0
    assert bound.earlier_bound == bound.reconstruction
    assert bound.bound is None and bound.generator_term is None and bound.mutual_information is None


def test_what_the_code_knows():
    """Two far apart codes: log 2 nats, the rest of RATE the distance of their mixture from the prior. One code: 0."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(8, 1)

    def encoder(x):
        return 50.0 * (x[:, :1] - 0.5), torch.full((len(x), 1), -2.0)

    bound = rx.vae_bound(encoder, nn.Linear(1, 2), x, aggregate=True, draws=4, seed=0)
    assert bound.encoder_information == pytest.approx(math.log(2), abs=1e-5)
    assert bound.marginal_divergence == pytest.approx(bound.rate - math.log(2))
    alike = rx.vae_bound(lambda x: torch.ones(len(x), 6), nn.Linear(3, 2), x, aggregate=True, draws=4, seed=0)
    assert alike.encoder_information == pytest.approx(0.0, abs=1e-6)


def test_the_code_of_the_linear_vae():
    """Near the mutual information of two Gaussians: the marginal code is one, of covariance A C A^T + diag(v)."""
    bound = linear_bound(aggregate=True, draws=16)
    covariance = LINEAR.weight @ LINEAR.weight.T + LINEAR.scale**2 * np.eye(6)
    code = LINEAR.encoder_weight @ covariance @ LINEAR.encoder_weight.T + np.diag(LINEAR.variance)
    want = 0.5 * (np.linalg.slogdet(code)[1] - np.log(LINEAR.variance).sum())
    # RATE of the same samples is as uncertain, by 0.05
    assert bound.encoder_information == pytest.approx(want, abs=0.2) and bound.encoder_information < math.log(400)
    assert bound.encoder_information + bound.marginal_divergence == pytest.approx(bound.rate)


def test_batches_draws_and_seeds():
    """Whatever the batch, to rounding; more draws begin with fewer; equal seeds give equal bits."""
    one, two = linear_bound(draws=3), linear_bound(draws=3, batch_size=7)
    for name in ("stderr", "monte_carlo_stderr"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-9)
    assert one.bound == pytest.approx(two.bound, rel=1e-12)
    assert linear_bound(draws=3).to_dict() == one.to_dict()
    assert linear_bound(draws=3, seed=1).reconstruction != one.reconstruction
    assert linear_bound(X[:50], draws=3).per_sample["reconstruction"][:50] == pytest.approx(
        one.per_sample["reconstruction"][:50], rel=1e-12
    )
    torch.manual_seed(5)
    drawn = linear_bound(seed=None)
    torch.manual_seed(5)
    assert linear_bound(seed=None).to_dict() == drawn.to_dict()
    assert linear_bound(draws=1).monte_carlo_stderr == {}


def test_networks_are_left_as_they_were():
    """Evaluation mode inside, each module's own mode and gradients' absence afterwards, also after an error."""
    encoder, decoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)), nn.Linear(2, 4)
    encoder[2].eval()
    x = torch.rand(6, 4)
    first = rx.vae_bound(encoder, decoder, x, seed=0)
    assert first.to_dict() == rx.vae_bound(encoder, decoder, x, seed=0).to_dict()
    modes = [module.training for module in encoder.modules()]
    assert modes == [True, True, True, False] and decoder.training
    with pytest.raises(ValueError):
        rx.vae_bound(encoder, lambda z: z, x, seed=0)
    assert [module.training for module in encoder.modules()] == modes
    assert all(p.grad is None for p in encoder.parameters())


def test_arrays_of_other_libraries():
    assert linear_bound(Exchanged(X), draws=2).to_dict() == linear_bound(X, draws=2).to_dict()


class Autoencoder(nn.Module):
    """As diffusers': encode(x).latent_dist, decode(z).sample, latents [B, c, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(2, 1, 2, 2)
        self.drop = nn.Dropout(0.5)

    def encode(self, x):
        mean, logvar = self.drop(self.down(x)).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=logvar))

    def decode(self, z):
        return SimpleNamespace(sample=self.up(z))


def test_diffusers_autoencoders():
    model, x = Autoencoder(), torch.randint(2, (5, 1, 4, 4)).float()
    bound = rx.vae_bound(model.encode, model.decode, x, seed=0, draws=2)
    assert model.training and model.drop.training  # restored, and off meanwhile:
    assert bound.to_dict() == rx.vae_bound(model.encode, model.decode, x, seed=0, draws=2).to_dict()
    model.eval()
    together = rx.vae_bound(lambda x: model.down(x), lambda z: model.up(z), x, seed=0, draws=2)
    assert together.to_dict() == bound.to_dict()
    by_hand = model.down(x.double().float()).detach()
    mean, log_variance = by_hand.double().chunk(2, 1)
    rate = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
    assert bound.rate == pytest.approx(float(rate), rel=1e-6)


def test_an_autoencoder_of_diffusers():
    """Its encode and decode as they are; the rate is what its own distribution says."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), latent_channels=2, norm_num_groups=4, sample_size=8
    )
    x = torch.rand(5, 1, 8, 8)
    bound = rx.vae_bound(model.encode, model.decode, x, likelihood=rx.GaussianLikelihood(0.1), seed=0, draws=2)
    law = model.eval().encode(x).latent_dist
    assert bound.rate == pytest.approx(float(law.kl().detach().mean()), rel=1e-5)
    assert law.mean.shape == (5, 2, 8, 8)
    found = rx.importance_weighted_log_likelihood(
        model.encode, model.decode, x, likelihood=rx.GaussianLikelihood(0.1), seed=0, draws=2
    )
    assert float(found.elbo.mean()) == pytest.approx(bound.elbo, rel=0.05)


def test_numpy_bytes_and_flat_outputs():
    """uint8 as it is, images of any shape from a decoder of flat pixels; the same from NumPy and torch."""
    images = np.random.default_rng(0).integers(0, 2, (6, 2, 3)).astype(np.uint8)
    encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), nn.Linear(2, 6)
    one = rx.vae_bound(encoder, decoder, images, seed=0)
    assert one.to_dict() == rx.vae_bound(encoder, decoder, torch.from_numpy(images).float(), seed=0).to_dict()
    half = rx.vae_bound(encoder.bfloat16(), decoder.bfloat16(), images, seed=0)
    assert half.reconstruction == pytest.approx(one.reconstruction, rel=0.02)  # bfloat16 has 3 digits


def test_results_are_shown_and_saved(tmp_path):
    bound = linear_bound(aggregate=True, draws=2)
    text = str(bound)
    for part in ("REC", "RATE", "MI = E KL(p || p')", "earlier", "400 samples", "m = 400", "I_q(x; z)"):
        assert part in text
    assert "needs an auxiliary decoder" in str(linear_bound(auxiliary_decoder=None))
    bound.save(tmp_path / "bound.json")
    assert json.loads((tmp_path / "bound.json").read_text())["bound"] == pytest.approx(bound.bound)
    bound.plot(tmp_path / "bound.png")
    assert (tmp_path / "bound.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"path must end in \.json"):
        bound.save(tmp_path / "bound.txt")
    assert repr(bound).startswith("VAEBound(bound=")


ENCODER, DECODER, DATA = nn.Linear(3, 4), nn.Linear(2, 3), torch.rand(10, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": DATA[:1]}, ValueError, "data has 1 samples, at least 2 are needed"),
        ({"data": torch.rand(3, 0)}, ValueError, r"data is empty, shape \[3, 0\]"),
        ({"data": torch.full((10, 3), math.nan)}, ValueError,
         r"NaN or infinite values in rows 0, 1, 2, 3, 4 and 5 more"),
        ({"data": 2 * DATA + 1}, ValueError, "data must be between 0 and 1 for a Bernoulli likelihood"),
        ({"data": [[0.0]]}, TypeError, "data must be a NumPy array or a torch tensor, got list"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": 1.5}, TypeError, "draws must be an int, got float"),
        ({"rho": -1.0}, ValueError, "rho must be finite and not negative"),
        ({"rho": "1"}, TypeError, "rho must be a number, got str"),
        ({"num_training": 0}, ValueError, "num_training must be at least 1"),
        ({"latents": "both"}, ValueError, "latents must be posterior or prior, got 'both'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"encoder": 3}, TypeError, "encoder must be a module or a function of a batch, got int"),
        ({"auxiliary_decoder": 3}, TypeError, "auxiliary_decoder must be a module or a function"),
        ({"encoder": nn.Linear(3, 5)}, ValueError,
         r"encoder must return .* \[10, 2 d, ...\] for 10 samples, got \[10, 5\]"),
        ({"encoder": lambda x: x.sum()}, ValueError, r"encoder must return .* got \[\]"),
        ({"encoder": lambda x: (x, x[:, :2])}, ValueError, r"one shape \[10, d, ...\] .* got \[10, 3\] and \[10, 2\]"),
        ({"encoder": lambda x: (x, x, x)}, TypeError, "encoder must return .* got 3 values"),
        ({"encoder": lambda x: None}, TypeError, "encoder must return .* got NoneType"),
        ({"encoder": lambda x: (x, 100 * (x > 0.99 * x.max()) + 0 * x)}, ValueError,
         r"encoder returns a log_variance whose exponential overflows float32 in row"),
        ({"encoder": lambda x: (x / 0, x)}, ValueError, "encoder returns a mean that is not finite in rows 0, 1, "),
        ({"decoder": nn.Linear(2, 4)}, ValueError,
         r"decoder must return logits of 3 pixels for each of 160 latents .* got \[160, 4\]"),
        ({"decoder": lambda z: (z, z)}, ValueError, "decoder must return logits, got 2 tensors"),
        ({"decoder": lambda z: "no"}, TypeError, "decoder must return logits as tensors, got str"),
        ({"decoder": lambda z: z[:, :1].expand(-1, 3) * math.inf}, ValueError,
         r"log p\(x\|z\) is not finite, the output of decoder is not finite or extreme, in rows 0"),
        ({"auxiliary_decoder": nn.Linear(2, 4)}, ValueError, "auxiliary_decoder must return logits of 3 pixels"),
        ({"likelihood": "gaussian", "decoder": lambda z: (z, z, z)}, ValueError,
         r"must return mean or \(mean, log_scale\), got 3 tensors"),
        ({"likelihood": "gaussian", "decoder": lambda z: (torch.zeros(len(z), 3), torch.zeros(len(z), 2))},
         ValueError, r"log_scale of 3 pixels"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    arguments = {"encoder": ENCODER, "decoder": DECODER, "data": DATA, "seed": 0, **change}
    networks = [arguments.pop(name) for name in ("encoder", "decoder", "data")]
    with pytest.raises(error, match="vae_bound: .*" + message):
        rx.vae_bound(*networks, **arguments)

"""Schedules of a user's class, and what holds of any under a sampler of t."""

import torch

import hosm_losses as hosm


def own(alpha=torch.ones_like, sigma=torch.clone, ends=(1e-3, 1.0), base=hosm.Schedule, **methods):
    """A schedule of a user's class: α, σ and other methods as functions of t."""
    members = {name: staticmethod(f) for name, f in methods.items()}
    if alpha is not None:
        members["alpha"] = staticmethod(alpha)
    if sigma is not None:
        members["sigma"] = staticmethod(sigma)
    if ends is not None:
        members["t_min"], members["t_max"] = ends
    return type("Own", (base,), members)()


def assert_that_a_sampler_changes_no_mean(model, weighting, count):
    """Both of `time_sampler` estimate one mean, of the first term of so many draws."""
    x0, means, errors = torch.zeros(count, 1), [], []
    for sampler in ("schedule", "log_sigma_hat"):
        generator = torch.Generator().manual_seed(0)
        options = {"weighting": weighting, "time_sampler": sampler, "reduction": "none"}
        loss = hosm.first_order_dsm(model, x0, generator=generator, **options)
        means.append(loss.mean())
        errors.append(loss.std() / count**0.5)
    assert abs(means[0] - means[1]) < 5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5

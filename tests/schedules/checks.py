"""What holds of a schedule under any sampler of t."""

import torch

import hosm_losses as hosm


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

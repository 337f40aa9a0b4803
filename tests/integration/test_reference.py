"""The reference itself, against closed forms."""

import pytest
import torch

from tests.cases import gradients, networks
from tests.integration.reference import reference, relative_error
from tests.oracles import dense_derivatives, dense_terms


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_terms_and_gradients_are_those_of_whole_jacobians(kind):
    """Of networks by hand, of which PyTorch's derivatives are right at every order."""
    network, shape = networks()[kind]
    network.by_hand = True
    x, noise, probe = torch.randn(3, 2, *shape)
    t, sigma = torch.tensor([0.3, 0.6]), torch.tensor([0.6, 0.9])

    def row(i):
        parts = dense_derivatives(lambda point: -network(point[None], t[i : i + 1])[0], x[i])
        held = (parts[0] + noise[i].flatten()).detach(), parts[1].detach()
        return torch.stack(dense_terms(*parts, sigma[i], noise[i], probe[i][None], frozen=held))

    terms, parameters = torch.stack([row(0), row(1)], 1), list(network.parameters())
    found = reference(lambda x: -network(x, t), parameters, x, noise, probe, sigma)
    assert relative_error(found.terms, terms) < 1e-10
    for row, got in zip(terms, found.gradients, strict=True):
        exact = torch.cat([part.flatten() for part in gradients(row.mean(), network)])
        assert relative_error(got, exact) < 1e-8

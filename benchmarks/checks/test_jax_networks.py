"""The networks of the likelihood, once more in JAX, are those in PyTorch, in float64.

python -m pytest benchmarks/checks/test_jax_networks.py
"""

import pytest
import torch

import hosm_losses as hosm
from benchmarks.likelihood_problems import ring
from benchmarks.trained import Convolutional, Dense

jax = pytest.importorskip("jax")
pytest.importorskip("diffrax")

from benchmarks.peers.diffrax import twin_of  # noqa: E402
from benchmarks.peers.jax_losses import parameters_of  # noqa: E402

SCHEDULE = hosm.VESchedule(sigma_max=20.0)
NETWORKS = {
    "convolutional": (Convolutional(SCHEDULE, 0.3, width=8), (3, 8, 8)),
    "dense": (Dense(SCHEDULE, 0.7, width=16), (64,)),
    "ring": (ring().model.network, (2,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_values(name):
    network, shape = NETWORKS[name]
    network = network.double()
    x, t = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]).double()
    with torch.no_grad():
        expected = network(x, t)
    with jax.enable_x64(True):
        found = twin_of(network)(parameters_of(network), x.numpy(), t.numpy())
        found = torch.tensor(jax.device_get(found))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

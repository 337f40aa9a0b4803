"""What a projection has to be, and the model's functions on its subspace."""

import copy
import pickle

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.model.subspace import VECTORS
from tests.cases import VP, assert_same
from tests.subspaces import PARTICLES, centred, masked, pair

X = torch.zeros(4, *PARTICLES, dtype=torch.float64)
MATRIX = torch.eye(6, dtype=torch.float32)


def network(x, t):
    return 0.5 * x


def loss(subspace, x0=X):
    return hosm.first_order_dsm(hosm.ScoreModel(network, VP, subspace=subspace), x0)


def by_matrix(matrix):
    return lambda x: (x.flatten(1) @ matrix.to(x.dtype)).reshape(x.shape)


slanted = torch.eye(6)
slanted[0, 1] = 1
slanted[1, 1] = 0
ALONE = "treats samples independently; got one that depends on the batch"
REFUSED = {
    "scaled": (lambda x: 0.5 * x, "idempotent; got one that is not idempotent"),
    "slanted": (by_matrix(slanted), "symmetric and idempotent; got one that is not symmetric"),
    "of the batch": (lambda x: x - x.mean(0, keepdim=True), ALONE),
    "shifted": (lambda x: centred(x) + 1, "got one that is not (symmetric|idempotent)"),
    "not linear": (lambda x: x.abs(), "got one that is not symmetric"),
    "shape": (lambda x: x.mean(1, keepdim=True), "returns tensors like its argument"),
    "flat": (lambda x: x.flatten(1), "returns tensors like its argument"),
    "dtype": (lambda x: centred(x).float(), "returns tensors like its argument"),
    "bool": (lambda x: centred(x) > 0, "returns tensors like its argument"),
    "mask of the samples": (lambda x: x * torch.ones(5, 3, 1), "a mask must fit all of them"),
    "matrix in float32": (lambda x: x.flatten(1) @ MATRIX, "Use the dtype of x in it"),
    "zero": (lambda x: 0 * x, "one dimension or more; got a projection to zero"),
    "other dimensions": ((centred, 5), "the 5 dimensions that you gave; got about 4 in 6"),
    "None": (lambda x: None, "returns tensors like its argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_map_that_is_no_projection_of_each_sample_is_refused(name):
    subspace, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"subspace: expected .*{words}"):
        loss(subspace)


def test_a_mask_of_as_many_samples_as_there_are_checked_vectors_is_refused():
    mask = torch.ones(VECTORS, 3, 1)
    mask[2:, 2] = 0
    with pytest.raises(ValueError, match="subspace: expected"):
        loss(lambda x: x * mask.to(x.dtype))


@pytest.mark.parametrize(
    ("subspace", "error"),
    [
        (1, TypeError),
        ((3, 4), TypeError),
        ((centred, 2.0), TypeError),
        ((centred, 0), ValueError),
        ((centred,), ValueError),
        ((centred, 4, 1), ValueError),
    ],
)
def test_a_constructor_takes_a_projection_and_whole_dimensions(subspace, error):
    with pytest.raises(error, match="subspace"):
        hosm.ScoreModel(network, VP, subspace=subspace)


def test_dimensions_are_required_above_4096_elements_and_compared_with_an_estimate():
    large = torch.zeros(1, 5000, 1)
    assert loss((centred, 4999), large).isfinite()
    with pytest.raises(ValueError, match=r"\(project, dimensions\) for samples of more than 4096"):
        loss(centred, large)
    mask = torch.ones(5000, 1)
    mask[2000:] = 0
    spread = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(spread.double())[0]
    for project, dimensions, near in (
        (centred, 4999, 1),  # what is left out has fewer dimensions than there are vectors
        (lambda x: x.mean(1, keepdim=True).expand_as(x), 1, 1),
        (lambda x: x * mask.to(x.dtype), 2000, 1),
        (lambda x: x - (Q @ (Q.T @ x.double())).to(x.dtype), 4960, 40),  # by an estimate
    ):
        assert loss((project, dimensions), large).isfinite()
        for wrong in (dimensions - near, min(dimensions + near, 5000)):
            if wrong > 0:
                with pytest.raises(ValueError, match=f"the {wrong} dimensions that you gave; got"):
                    loss((project, wrong), large)


def test_the_projection_is_checked_once_for_a_shape_and_type():
    calls = []

    def counted(x):
        calls.append(x.dtype)
        return centred(x)

    model = hosm.ScoreModel(network, VP, subspace=counted)
    hosm.first_order_dsm(model, X.float())
    first = len(calls)
    calls.clear()
    hosm.first_order_dsm(model, X.float())
    again = len(calls)
    assert first > again + 5
    assert torch.float64 not in calls
    before = torch.get_rng_state()
    model.subspace_of("x0", X.double())
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_of_the_model_return_what_lies_on_the_subspace():
    for prediction in ("epsilon", "score", "x0", "v", "velocity"):
        model, small, Q = pair("flow", prediction)
        y = torch.randn(5, Q.shape[1]).double()
        x = (y @ Q.T).reshape(5, *PARTICLES)
        t = torch.linspace(0.1, 0.9, 5).double()
        for name in ("noise", "score", "denoise"):
            value, expected = getattr(model, name)(x, t), getattr(small, name)(y, t)
            assert_same(value, (expected @ Q.T).reshape(x.shape))
            assert_same(getattr(model, name)(x + 3, t), value)  # of its projection


def test_posterior_covariances_are_those_in_coordinates():
    for project in (centred, masked):
        model, small, Q = pair("vp", "v", project)
        y = torch.randn(5, Q.shape[1]).double()
        x, t = (y @ Q.T).reshape(5, *PARTICLES), torch.linspace(0.1, 0.9, 5).double()
        whole, own = hosm.denoising_posterior(model, x, t), hosm.denoising_posterior(small, y, t)
        assert_same(whole.mean.flatten(1) @ Q, own.mean)
        dense = Q @ own.covariance.dense() @ Q.T
        assert_same(whole.covariance.dense(), dense)
        assert_same(whole.covariance.diagonal().flatten(1), dense.diagonal(dim1=1, dim2=2))
        assert_same(whole.covariance.trace(), own.covariance.trace())
        v = torch.randn(2, 5, *PARTICLES).double()
        product = (own.covariance @ (v.flatten(2) @ Q)) @ Q.T
        assert_same(whole.covariance @ v, product.reshape(v.shape))


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0])[:, None])

    def forward(self, x):
        return x * self.mask.to(x.dtype)


def test_a_model_with_a_subspace_is_copied_saved_and_printed():
    model = hosm.ScoreModel(torch.nn.Identity(), VP, subspace=(Masked(), 4))
    assert "subspace.mask" in dict(model.named_buffers())
    model.call = lambda network, x, t: network(x)
    expected = hosm.first_order_dsm(model, X, t=torch.full((4,), 0.5), noise=X + 1)
    copied = copy.deepcopy(model)
    found = hosm.first_order_dsm(copied, X, t=torch.full((4,), 0.5), noise=X + 1)
    torch.testing.assert_close(found, expected)
    model = hosm.ScoreModel(torch.nn.Identity(), VP, subspace=centred)
    assert "subspace=centred" in repr(model)
    assert pickle.loads(pickle.dumps(model)).subspace is centred


def test_autocast_does_not_shorten_the_projection():
    project = by_matrix(torch.eye(6, dtype=torch.float64) - 1 / 6)
    model = hosm.ScoreModel(network, VP, subspace=project)
    x = torch.randn(3, *PARTICLES, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.project(x)
        assert hosm.second_order_dsm(model, model.project(x)).isfinite()
    torch.testing.assert_close(found, project(x), rtol=0, atol=0)


def test_transforms_of_torch_func_may_be_the_first_to_call():
    model = hosm.ScoreModel(network, VP, subspace=centred)
    t, noise = torch.full((4,), 0.5), torch.randn(X.shape)
    gradient = torch.func.grad(lambda x: hosm.first_order_dsm(model, x, t=t, noise=noise))(X)
    assert_same(centred(gradient), gradient)
    model = hosm.ScoreModel(network, VP, subspace=centred)
    noises = torch.stack([noise, 2 * noise])
    losses = torch.func.vmap(lambda noise: hosm.first_order_dsm(model, X, t=t, noise=noise))(
        noises
    )
    assert_same(losses[1], hosm.first_order_dsm(model, X, t=t, noise=2 * noise))


def test_a_projection_may_write_to_its_argument():
    def in_place(x):
        x -= x.mean(1, keepdim=True)
        return x

    x0, noise = centred(torch.randn(X.shape)), torch.randn(X.shape)
    inputs = {"t": torch.full((4,), 0.5), "noise": noise, "probe": torch.randn(X.shape)}
    before = [tensor.clone() for tensor in (x0, *inputs.values())]
    losses = [
        hosm.third_order_dsm(hosm.ScoreModel(network, VP, subspace=each), x0, **inputs)
        for each in (in_place, centred)
    ]
    assert_same(*losses)
    assert all(map(torch.equal, before, (x0, *inputs.values())))


def test_half_precision_is_on_the_subspace_within_its_rounding():
    model = hosm.ScoreModel(network, VP, subspace=centred)
    for dtype in (torch.bfloat16, torch.float16):
        x0 = centred(torch.randn(X.shape)).to(dtype)
        losses = [
            hosm.first_order_dsm(model, x, t=torch.full((4,), 0.5, dtype=t), noise=x)
            for x, t in ((x0, torch.float32), (centred(x0.double()), torch.float64))
        ]
        assert_same(losses[0].double(), losses[1], 0.05)
        with pytest.raises(ValueError, match="x0: expected samples on the subspace"):
            hosm.first_order_dsm(model, x0 + 0.5)

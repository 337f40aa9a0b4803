"""What users write: the type checker reads it without a error_message, and it runs."""

import torch
from torch import Tensor, nn

import hosm_losses as hosm


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.layer(x) + t[:, None]


def sampler(batch: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(batch, generator=generator).clamp(0.01, 0.99)


def test_a_training_step() -> None:
    model = hosm.ScoreModel(Network(), hosm.VPSchedule(), "v", time=999.0)
    x0 = torch.randn(4, 3)
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = [
        hosm.first_order_dsm(model, x0, weighting="native", generator=generator),
        hosm.second_order_dsm(model, x0, probes=hosm.Hutchinson(2, "dct"), weights=[1, 0.1, 0.1]),
        hosm.third_order_dsm(
            model,
            x0,
            t=torch.rand(4),
            noise=torch.randn(4, 3),
            probe=torch.randn(2, 4, 3),
            weights=torch.ones(4),
            weighting="likelihood",
            engine="reverse",
            reduction="sum",
            model_kwargs={"scale": 2.0},
        ),
        hosm.third_order_dsm(model, x0, probes="exact", time_sampler=sampler),
        hosm.second_order_dsm(model, x0, probes=hosm.Paired(), weights="paper"),
        hosm.first_order_dsm(model, x0, antithetic=True, time_sampler=hosm.AdaptiveTimes()),
        hosm.first_order_dsm(model, x0, t=torch.rand(4), noise=x0, targets=torch.randn(4, 3)),
        hosm.third_order_dsm(model, x0, targets=hosm.AveragedTargets(torch.randn(9, 3))),
        hosm.third_order_dsm(model, x0, targets=hosm.TargetScores(-x0, information=1.0)),
    ]
    torch.stack(losses).sum().backward()
    terms: hosm.DSMTerms = hosm.dsm_terms(model, x0, order=2, engine="taylor")
    assert terms.second is not None
    assert terms.third is None


def test_modules_return_what_return_terms_says() -> None:
    model = hosm.ScoreModel(Network(), hosm.VPSchedule())
    objective = hosm.ThirdOrderDSM(model, fraction=0.5, weights=(1, 0.1, 0.1, 0.01))
    x0 = torch.randn(4, 3)
    objective(x0).backward()
    loss, terms = objective(x0, t=torch.rand(4), return_terms=True)
    first, second, trace, third = terms
    assert loss.ndim == 0
    assert terms.rows is not None
    assert terms.t.shape == first.shape
    assert second is not None
    assert trace is not None
    assert third is not None
    hosm.SecondOrderDSM(model, probes=hosm.Paired())(x0).backward()
    several: list[nn.Module] = [hosm.FirstOrderDSM(model), hosm.SecondOrderDSM(model, probes=2)]
    assert len(several) == 2


def test_a_likelihood() -> None:
    model = hosm.ScoreModel(Network(), hosm.VESchedule(sigma_max=2.0))
    result: hosm.NLLResult = hosm.ode_nll(
        model, torch.randn(2, 3), solver=hosm.FixedGrid(8), divergence="exact"
    )
    nll: Tensor = result.nll
    assert nll.shape == (2,)
    bound: hosm.NLLResult = hosm.variational_nll(model, torch.randn(2, 3), samples=8)
    assert bound.nll.shape == (2,)


def test_schedules_of_ones_own() -> None:
    class Linear(hosm.Schedule):
        t_min, t_max = 0.01, 1.0

        def alpha(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def sigma(self, t: Tensor) -> Tensor:
            return t

    alpha, sigma = Linear()(torch.tensor([0.5]))
    assert float(alpha) == 2 * float(sigma)

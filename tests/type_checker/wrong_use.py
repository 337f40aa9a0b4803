"""What the type checker has to refuse: a comment that refuses nothing is an error there."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

import torch

import hosm_losses as hosm


def misspelled(model: hosm.ScoreModel, x0: torch.Tensor) -> None:
    hosm.SecondOrderDSM(model, weights="equal")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, engine="jvp")  # pyright: ignore[reportArgumentType]
    hosm.Hutchinson(4, "normal")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, targets="all")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, probes="all")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, weighting="snr")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, time_sampler="uniform")  # pyright: ignore[reportArgumentType]
    hosm.first_order_dsm(model, x0, reduction="avg")  # pyright: ignore[reportArgumentType]
    hosm.third_order_dsm(model, x0, n_probes=2)  # pyright: ignore[reportCallIssue]
    hosm.ScoreModel(model, hosm.VPSchedule(), "eps")  # pyright: ignore[reportArgumentType]
    hosm.ode_nll(model, x0, solver="rk45")  # pyright: ignore[reportArgumentType]
    hosm.ode_nll(model, x0, divergence="hutch")  # pyright: ignore[reportArgumentType]
    hosm.ode_nll(model, x0, dequantization="flow")  # pyright: ignore[reportArgumentType]


def of_no_use(model: hosm.ScoreModel, x0: torch.Tensor) -> None:
    hosm.first_order_dsm(model, x0, probe=x0)  # pyright: ignore[reportCallIssue]
    hosm.FirstOrderDSM(model, probes=2)  # pyright: ignore[reportCallIssue]
    hosm.dsm_terms(model, x0, weights=(1, 1, 1, 1))  # pyright: ignore[reportCallIssue]


def mistaken(model: hosm.ScoreModel, x0: torch.Tensor) -> None:
    objective = hosm.SecondOrderDSM(model)
    _ = objective(x0).third  # pyright: ignore[reportAttributeAccessIssue]
    objective(x0, return_terms=True).backward()  # pyright: ignore[reportAttributeAccessIssue]
    hosm.dsm_terms(model, x0).backward()  # pyright: ignore[reportAttributeAccessIssue]
    hosm.third_order_dsm(model.network, x0)  # pyright: ignore[reportArgumentType]

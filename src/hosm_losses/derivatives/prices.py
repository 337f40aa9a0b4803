r"""What a training step costs with each engine, and what is said where it costs more.

Cost, in network evaluations with the parameter gradient (a first-order step is 3):
    `EVALUATIONS`. K directions share the value at order two and with C; for G all engines but
    "forward" fold them into the batch.
"""

from torch import Tensor

# Network evaluations of a training step.
EVALUATIONS = {
    "order two": {"taylor": 6, "reverse": 7, "forward": 8},
    "third='exact'": {"taylor": 12, "reverse": 12, "forward": 16},
    "third='laplacian'": {"taylor": 9, "forward": 22},
    "third='sliced'": {"taylor": 12, "forward": 22},
}


def kind_of(direction: Tensor, order: int, second_direction: Tensor | None) -> str:
    """The row of `EVALUATIONS` that was asked for."""
    if order == 2:
        return "order two"
    if second_direction is None:
        return "third='exact'"
    return "third='laplacian'" if second_direction is direction else "third='sliced'"


def price_of_another(owner: object, why: str, engine: str, kind: str) -> str:
    """What is said where an engine other than "taylor" gives D and G."""
    costs = EVALUATIONS[kind]
    price = EVALUATIONS[kind if "reverse" in costs else "third='exact'"][engine]
    before = f" instead of {costs['taylor']}" if price != costs["taylor"] else ""
    told = (
        f"derivative='auto': the engine 'taylor' cannot differentiate {type(owner).__name__} "
        f"({why}) The engine {engine!r} takes its place: for {kind} a training step takes "
        f"{price} evaluations of the network{before}, and more time for each."
    )
    if "reverse" not in costs:  # G takes the place of C
        told += (
            f" {kind} in forward mode costs more than 'exact', {costs['forward']} "
            f"evaluations, so 'exact' is taken; derivative='forward' keeps {kind}."
        )
    return told


def price_of_forward(kind: str) -> str:
    """What is said where forward mode was asked for, and the exact third order costs less."""
    costs, exact = EVALUATIONS[kind], EVALUATIONS["third='exact'"]
    return (
        f"derivative='forward': for {kind} a training step takes {costs['forward']} evaluations "
        f"of the network, for third='exact' {exact['forward']}; the engine 'taylor' takes "
        f"{costs['taylor']}."
    )

"""The errors of the engine."""


class DerivativeError(ValueError):
    """A derivative that cannot be taken, or would be wrong, with the remedy in its message."""


class ConstantError(DerivativeError):
    """An operator without a derivative in PyTorch; each engine would take it for a constant."""


class TaylorError(RuntimeError):
    """A function the Taylor engine cannot differentiate; reverse mode may."""


class NoRule(Exception):  # noqa: N818 - it never reaches a user
    """A call that a rule does not know; PyTorch's own function is differentiated in its place."""

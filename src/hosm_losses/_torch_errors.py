"""Words of PyTorch's errors by which one is told from another.

PyTorch keeps no text stable. `tests/test_torch_internals.py` has a test for each, which says in
which versions it was seen to hold; where one fails, this file is what to change.
"""

# Of an operator without a second derivative in reverse mode.
NOT_TWICE = ("derivative for aten::", "derivative for '", "@once_diff", "not differentiable with")
NO_FORWARD = "use forward AD with"  # of an operator without a forward derivative
NO_GRAPH = "does not require grad and does not have a grad_fn"  # of a gradient asked for inside
REENTRANT_CHECKPOINT = "compatible with .grad()"
HOOKS_IN_TRANSFORM = "saved tensor hooks"  # as of a checkpoint, under torch.func
DOUBLE_BACKWARD_OF_COMPILED = "does not currently support double backward"
CHANGED_SINCE = "modified by an inplace operation"
LOST_ATTRIBUTE = "Backward' object has no attribute"  # of a custom Function that dropped it
IN_SCRIPT = "TorchScript interpreter"  # out of a function of torch.jit
DEVICE_ERROR_TEXT = ("CUDA", "CUBLAS", "cuDNN", "CUDNN", "HIP error", "out of memory")  # failed

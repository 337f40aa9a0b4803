"""Faults planted in the source one at a time, each of which the fast tests have to notice.

    python -m tests.mutants [NUMBER ...] [--named-only]

For each mutant a copy of the package has `old` replaced by `new`. The named tests run first; the
rest of the fast tests run only for mutants which those let through. `.ci/mutants` writes the
outcome to `tests/mutants.txt`. Whoever rewrites a line of the source rewrites its mutant.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hosm_losses"


class Mutant(NamedTuple):
    """A fault: `old`, which occurs once in `file`, becomes `new`; `tests` are tried first."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # taylor/
    Mutant(
        "taylor/pointwise.py",
        "collect(2 * tangents * b_tangents, pairs)",
        "collect(2 * tangents * tangents, pairs)",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/pointwise.py",
        "        yield density * x * (square - 4)\n",
        "        yield density * (square - 4)\n",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/pointwise.py",
        "straight_on = scaled > threshold",
        "straight_on = x > threshold",
        "tests/taylor/test_edges.py",
    ),
    Mutant(
        "taylor/matrices.py",
        "(products * products.mT).sum((-2, -1))",
        "(products * products).sum((-2, -1))",
        "tests/taylor/test_matrices.py",
    ),
    Mutant(
        "taylor/matrices.py",
        "seconds = seconds + collect(firsts.square(), A.pairs)[: len(seconds)]",
        "",
        "tests/taylor/test_matrices.py",
    ),
    Mutant(
        "taylor/matrices.py",
        "inverse = inverse.where(info[..., None, None] == 0, torch.nan)",
        "inverse = inverse.where(info[..., None, None] == 0, 0.0)",
        "tests/taylor/test_matrices.py",
    ),
    Mutant(
        "taylor/matrices.py",
        "    with without_autocast(a.device.type):\n",
        "    if True:\n",
        "tests/taylor/test_matrices.py",
    ),
    Mutant(
        "taylor/matrices.py",
        "((change + change.mT) / 2)",
        "change",
        "tests/taylor/test_matrices.py",
    ),
    Mutant(
        "taylor/jets.py",
        "first.movedim(0, -1).reshape(",
        "first.reshape(",
        "tests/taylor/test_directional.py",
    ),
    Mutant(
        "taylor/attention.py",
        "return (mixed if mask is None else ops.mul(mixed, _allows_any(mask))), weights",
        "return mixed, weights",
        "tests/taylor/test_attention_masks.py",
    ),
    Mutant(
        "taylor/products.py",
        "    with without_autocast(others[0].device.type):\n        return form[place](*others)",
        "    return form[place](*others)",
        "tests/taylor/test_edges.py",
    ),
    Mutant(
        "taylor/products.py",
        "return with_bias(convolved, bias, x.shape[0])",
        "return with_bias(convolved, bias, len(samples))",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/norms.py",
        "along = -3 * _third_along(x.along, y.along, y.along, xy, xy, yy)",
        "along = -3 * _third_along(x.along, y.along, y.along, xy, yy, yy)",
        "tests/taylor/test_pullbacks.py",
    ),
    Mutant(
        "taylor/norms.py",
        "along + self.stack(seconds).along",
        "along",
        "tests/taylor/test_pullbacks.py",
    ),
    Mutant(
        "taylor/norms.py",
        "torch.cat([torch.zeros_like(rho), c.along])",
        "torch.cat([torch.ones_like(rho), c.along])",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/pointwise.py",
        "s, t1, value=2)  # −1",
        "s, t1, value=1)  # −1",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/primitives.py",
        "return input.copy_(result) if inplace else result",
        "return result",
        "tests/taylor/test_primitives.py",
    ),
    Mutant(
        "taylor/norms.py",
        "norm(ops.value(x), mean, variance, None, None, True, *options)",
        "norm(ops.value(x).cos(), mean, variance, None, None, True, *options)",
        "tests/taylor/test_primitives.py",
    ),
    Mutant(
        "taylor/linear.py",
        "dropped = x.like(x.stack * function(torch.ones_like(x.stack[0]), p, True))",
        "dropped = x.like(function(x.stack, p, True))",
        "tests/taylor/test_edges.py",
    ),
    Mutant(
        "taylor/linear.py",
        "stack = torch.stack([component[index] for component in x.stack.unbind()])",
        "stack = x.stack[(slice(None), *parts)]",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/attention.py",
        "add_products(of_weights, again[:1], total(value), -1)",
        "add_products(of_weights, again[:1], total(weights * a), -1)",
        "tests/taylor/test_pullbacks.py",
    ),
    Mutant(
        "taylor/in_place.py",
        "values += [0] * (count - len(values))",
        "values += values[:1] * (count - len(values))",
        "tests/taylor/test_in_place.py",
    ),
    Mutant(
        "taylor/memory.py",
        "    if jet.memory is not None and len(alive(jet.memory)) > 1:\n",
        "    if False:\n",
        "tests/taylor/test_in_place.py",
    ),
    Mutant(
        "taylor/memory.py",
        "if versions([value]) != [version]:",
        "if False:",
        "tests/taylor/test_in_place.py",
    ),
    Mutant(
        "taylor/linear.py",
        'isinstance(part, list) or getattr(part, "ndim", 0) for part in parts',
        "isinstance(part, list | Tensor) for part in parts",
        "tests/taylor/test_in_place.py",
    ),
    Mutant(
        "taylor/jets.py",
        "            refuse_constant(func, floats[0])\n",
        "            pass\n",
        "tests/taylor/test_constants.py",
    ),
    Mutant(
        "taylor/primitives.py",
        "                refuse_constant(func, result)\n",
        "                pass\n",
        "tests/taylor/test_constants.py",
    ),
    Mutant(
        "taylor/jets.py",
        "(func not in OF_COMPLEX or len(jets) > 1)",
        "func not in OF_COMPLEX",
        "tests/taylor/test_complex.py",
    ),
    Mutant(
        "taylor/jets.py",
        "parts[1] = pytree.tree_map(partial(collect, pairs=pairs), parts[1])\n",
        'parts[1] = pytree.tree_map(partial(collect, pairs="squares"), parts[1])\n',
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/composites.py",
        "short = ops.value(length) * largest <= eps",
        "short = ops.value(length) <= eps",
        "tests/taylor/test_edges.py",
    ),
    Mutant(
        "taylor/linear.py",
        "any is_nonzero floor ceil round\n",
        "any is_nonzero floor ceil round frac\n",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/linear.py",
        "lambda cotangent: guarded(cotangent[0])",
        "lambda cotangent: guarded(cotangent.sum(0))",
        "tests/taylor/test_jet.py",
    ),
    Mutant(
        "taylor/jets.py",
        "    stack = stack if torch.is_grad_enabled() else stack.detach()\n",
        "",
        "tests/taylor/test_directional.py",
    ),
    Mutant(
        "taylor/jets.py",
        'second = jet(function, x, directions, "sum")',
        'second = jet(function, x, directions, "squares")',
        "tests/taylor/test_directional.py",
    ),
    Mutant(
        "taylor/linear.py",
        "linear(_move, _names, view=_table is VIEWS)",
        "linear(_move, _names)",
        "tests/taylor/test_in_place.py",
    ),
    # derivatives/
    Mutant(
        "derivatives/engines.py",
        "        refuse_dropped(vjp_c, wanted)\n        return vjp_c, value\n",
        "        return vjp_c, value\n",
        "tests/derivatives/test_backward.py",
    ),
    Mutant(
        "derivatives/engines.py",
        "if not in_turn and internals.checkpoint_hook(internals.ANY_CHECKPOINT) is None:",
        "if not torch.compiler.is_compiling():",
        "tests/test_training_loops.py",
    ),
    Mutant(
        "taylor/registry.py",
        "if not same or versions(incoming) != before:",
        "if not same:",
        "tests/derivatives/test_engines_agree.py",
    ),
    Mutant(
        "taylor/primitives.py",
        "_SafePrimitives(tables[-1]) if tables else nullcontext()",
        "nullcontext()",
        "tests/taylor/test_primitive_mode.py",
    ),
    Mutant(
        "taylor/primitives.py",
        'multi_head_attention_forward mish")',
        'mish")',
        "tests/test_transforms.py",
    ),
    Mutant(
        "taylor/primitives.py",
        "        if func == _DATA and is_traced():  # which is shallow, as .detach_() is\n"
        "            return args[0].detach()\n",
        "",
        "tests/test_transforms.py",
    ),
    Mutant(
        "taylor/attention.py",
        "key, value = (ops.repeat_interleave(tensor, times, -3) for tensor in (key, value))",
        "key, value = (ops.cat([tensor] * times, -3) for tensor in (key, value))",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/composites.py",
        "PRIMITIVES[function] = partial(_primitive, function, body)",
        "PRIMITIVES[function] = function",
        "tests/taylor/test_primitives.py",
    ),
    Mutant(
        "taylor/norms.py",
        "return _batch_norm(ops, x, running_mean, running_var, weight, bias, eps=eps)",
        "return _batch_norm(ops, x, running_mean, running_var, weight, bias)",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/attention.py",
        "return attn_mask.masked_fill(~rows, 0.0).to(dtype)",
        "return attn_mask.to(dtype)",
        "tests/taylor/test_attention_masks.py",
    ),
    Mutant(
        "derivatives/kinks.py",
        "between, nodes = set[Any](), [internals.gradient_node(point)]",
        "between, nodes = set[Any](above), []",
        "tests/derivatives/test_kinks.py",
    ),
    Mutant(
        "derivatives/kinks.py",
        "update((2, 3) if jumping or order == 3 else (2,))",
        "update((2, 3))",
        "tests/derivatives/test_kinks.py",
    ),
    Mutant(
        "derivatives/kinks.py",
        'if name == "relu" or n % 2]',
        "]",
        "tests/derivatives/test_kinks.py",
    ),
    Mutant(
        "derivatives/engines.py",
        "vjp(derived, point, graph=wanted or push)",
        "vjp(derived, point, graph=push)",
        "tests/losses/test_paired.py",
    ),
    # A loss of a frozen network that can be passed back, and trains nothing.
    Mutant(
        "derivatives/engines.py",
        "seen, nodes = {point_node}, []",
        "seen, nodes = set(), []",
        "tests/losses/test_frozen.py",
    ),
    Mutant(
        "derivatives/engines.py",
        "graph=wanted or push)\n    wanted = wanted and may_train(value, x, point)\n",
        "graph=wanted or push)\n",
        "tests/losses/test_frozen.py",
    ),
    # The same of a likelihood.
    Mutant(
        "derivatives/engines.py",
        "        wanted = wanted and may_train(value, x, point)\n",
        "",
        "tests/likelihood/test_graph.py",
    ),
    Mutant(
        "taylor/memory.py",
        "further = pullbacks[1:] if needed[0] else ()",
        "further = pullbacks[1:]",
        "tests/taylor/test_recompute.py",
    ),
    Mutant(
        "derivatives/select.py",
        "            before.restore()\n            self",
        "            self",
        "tests/taylor/test_primitive_mode.py",
    ),
    Mutant(
        "derivatives/select.py",
        "self.kind = (*kind, x.dtype,",
        "self.kind = (x.dtype,",
        "tests/derivatives/test_choice.py",
    ),
    Mutant(
        "derivatives/select.py",
        "    copied = order == 3\n",
        "    copied = False\n",
        "tests/losses/test_dropout.py",
    ),
    Mutant(
        "derivatives/select.py",
        "if not any(self.surroundings) and not isinstance(error, RecursionError):",
        "if not isinstance(error, RecursionError):",
        "tests/derivatives/test_choice.py",
    ),
    Mutant(
        "derivatives/select.py",
        "            return\n        before = NetworkState(",
        "            pass\n        before = NetworkState(",
        "tests/derivatives/test_choice.py",
    ),
    Mutant(
        "derivatives/select.py",
        "sure = sure or call in self.memory.failed",
        "sure = True",
        "tests/derivatives/test_choice.py",
    ),
    Mutant(
        "derivatives/checkpointing.py",
        "        if any(inputs[place].stack is not entries[place] for place in jets):\n"
        "            raise DerivativeError(CHANGED_ARGUMENT)\n",
        "",
        "tests/taylor/test_in_place.py",
    ),
    # losses: from four probes on, the two estimates that are multiplied have probes in common.
    Mutant(
        "losses/paired.py",
        "mean_over_probes(estimates[half:])",
        "mean_over_probes(estimates[1:])",
        "tests/losses/test_random_options.py",
    ),
    # The value of order three stays, its gradient goes into the lower orders.
    Mutant(
        "losses/terms.py",
        "scale_rows(2 * ell_dot_v, Dv_plus_v.detach())",
        "scale_rows(2 * ell_dot_v, Dv_plus_v)",
        "tests/losses/test_random_options.py",
    ),
    # Averaged targets: each sample counts itself twice in a batch, the moments are not
    # about the mean, float32 loses close neighbours, data far from zero their digits, and samples
    # of the reference are refused.
    Mutant(
        "losses/targets.py",
        "logits.diagonal().fill_(-torch.inf)",
        "logits.diagonal().fill_(0.0)",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "(v * (self.scale * self.data - self.mean))",
        "(v * self.scale * self.data)",
        "tests/losses/test_averaged_targets.py",
    ),
    Mutant(
        "losses/targets.py",
        " - inner(v, C2v) * self.mean",
        "",
        "tests/losses/test_averaged_targets.py",
    ),
    Mutant(
        "_checks.py",
        'torch.float32 if tensor.device.type == "mps" else torch.float64',
        "torch.float32",
        "tests/losses/test_averaged_targets.py",
    ),
    Mutant(
        "losses/targets.py",
        "data, reference = data - origin, reference - origin",
        "pass",
        "tests/losses/test_averaged_targets.py",
    ),
    Mutant(
        "losses/targets.py",
        "slack = logits[:, :-1].amax(1), 1 + 1e-12 * (scale * data).square().sum(1)",
        "slack = logits[:, :-1].amax(1), 1.0",
        "tests/losses/test_averaged_targets.py",
    ),
    # Scores: the own ones choose C, a part of order two, three or of the sums over j is left out,
    # float32 takes the digits of what cancels, padded coordinates and conditions are not looked
    # at, and no wrong temperature is noticed.
    Mutant(
        "losses/targets.py",
        "(squares.sum(0) - squares) / max(count - 1, 1)",
        "squares.mean(0).expand_as(squares)",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "Cv + (ell_v * c + c_v * ell + p + q) / 2",
        "Cv + (ell_v * c + p + q) / 2",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "of_ell = c_v.square() - inner(v, Cv) +",
        "of_ell = c_v.square() +",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "(ell_v + 2 * c_v) * q - ell_v * p",
        "2 * c_v * q",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "(v - C2v).reshape(probe.shape).to(probe.dtype)",
        "probe - C2v.reshape(probe.shape).to(probe.dtype)",
        "tests/losses/test_target_scores.py",
    ),
    Mutant(
        "losses/objective.py",
        "moments.mean.reshape(eps.shape)\n",
        "moments.mean.reshape(eps.shape).to(eps.dtype)\n",
        "tests/losses/test_target_scores.py",
    ),
    Mutant(
        "losses/targets.py",
        "information = torch.where(information > 0, information, math.inf)",
        "pass",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "losses/targets.py",
        "averaged = targets.averaged if isinstance(targets, TargetScores) else targets",
        "averaged = targets",
        "tests/losses/test_averaged_targets.py",
    ),
    Mutant(
        "losses/targets.py",
        "<= 5 * error",
        "<= 50 * error",
        "tests/losses/test_target_scores.py",
    ),
    # A small sample seems to have wrong scores; rounding counts as information, that of scores
    # which were converted since too; a matrix may have negative eigenvalues.
    Mutant(
        "losses/targets.py",
        " * (count / (count - 1))",
        "",
        "tests/losses/test_target_scores.py",
    ),
    Mutant(
        "losses/targets.py",
        "torch.where(eigenvalues > d * eps * eigenvalues[-1], eigenvalues, 0.0)",
        "eigenvalues",
        "tests/losses/test_target_scores.py",
    ),
    Mutant(
        "losses/targets.py",
        "max(of_scores**2, of_F, torch.finfo(torch.float32).eps)",
        "max(of_scores**2, of_F)",
        "tests/losses/test_target_scores.py",
    ),
    Mutant(
        "losses/targets.py",
        "if least < -slack * largest or skew >",
        "if skew >",
        "tests/losses/test_target_scores.py",
    ),
    # Indices that the caller gives stand for N - 1 times in place of N.
    Mutant(
        "losses/weighting.py",
        "(schedule.t_max - schedule.t_min + indices) * rate()",
        "(schedule.t_max - schedule.t_min) * rate()",
        "tests/losses/test_weighting_tables.py",
    ),
    # A fraction's higher terms take the factors of other samples.
    Mutant(
        "losses/objective.py",
        "of_higher = of_higher[rows]",
        "of_higher = of_higher[: len(rows)]",
        "tests/losses/test_random_options.py",
    ),
    # A trace alone, and a ramp at order three, are not needed or cost all orders.
    Mutant(
        "losses/options.py",
        "(is_used(weights[1]) or is_used(weights[2]))",
        "is_used(weights[1])",
        "tests/losses/test_ramps.py",
    ),
    Mutant(
        "losses/options.py",
        "if order == 3 and not is_used(weights[3]):",
        "if order == 3 and weights[3] is None:",
        "tests/losses/test_ramps.py",
    ),
    Mutant(
        "losses/objective.py",
        "needed_order(options.order, weights), None",
        "options.order, None",
        "tests/losses/test_ramps.py",
    ),
    # The rows of a fraction come from the global generator.
    Mutant(
        "losses/objective.py",
        "torch.randperm(len(x), device=x.device, **generator_kwargs(generator))",
        "torch.randperm(len(x), device=x.device)",
        "tests/losses/test_random_options.py",
    ),
    # model: copies of a batch with the conditions and times of other samples.
    Mutant(
        "model/score_model.py",
        "self.primitives and in_functorch() else",
        "not self.primitives and in_functorch() else",
        "tests/test_transforms.py",
    ),
    Mutant(
        "model/bound.py",
        "return tensor.repeat(count, *(1,) * (tensor.ndim - 1))",
        "return tensor.repeat_interleave(count, 0)",
        "tests/losses/test_random_options.py",
    ),
    # f counts q x, which the noise leaves out.
    Mutant(
        "losses/terms.py",
        "derived = model.of_f(derivatives, None, w)",
        "derived = model.of_f(derivatives, batch.x, w)",
        "tests/losses/test_random_options.py",
    ),
    # Indices of a table rounded to the precision of half data.
    Mutant(
        "model/score_model.py",
        "t.to(torch.promote_types(like.dtype, torch.float32))",
        "t.to(like.dtype)",
        "tests/schedules/test_discrete.py tests/test_half_precision.py",
    ),
    # A network changes in place what all samples share, and meets it changed in its next call.
    Mutant(
        "model/bound.py",
        "map_tensors(self.kwargs, Tensor.clone)",
        "per_sample(self.kwargs, lambda _, tensor: tensor.clone())",
        "tests/model/test_conditions.py",
    ),
    # schedules: a table whose last index is never drawn.
    Mutant(
        "schedules/discrete.py",
        "torch.randint(len(self.alphas_cumprod), shape, **options)",
        "torch.randint(len(self.alphas_cumprod) - 1, shape, **options)",
        "tests/schedules/test_base.py",
    ),
    # Indices drawn by log σ̂ are rounded down.
    Mutant(
        "schedules/base.py",
        "return t.round().long() if self.integer_time else t",
        "return t.long() if self.integer_time else t",
        "tests/losses/test_weighting_tables.py",
    ),
    # Bisection stops at half of the digits next to t_min.
    Mutant(
        "schedules/base.py",
        "range(2 * -int(math.log2(torch.finfo(target.dtype).eps)))",
        "range(-int(math.log2(torch.finfo(target.dtype).eps)))",
        "tests/schedules/test_base.py",
    ),
    # 1 - α² by a difference has no digits left near the data.
    Mutant(
        "schedules/continuous.py",
        "return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))",
        "return torch.sqrt(1 - torch.exp(-self.integrated_beta(t)))",
        "tests/schedules/test_base.py",
    ),
    # Building a model seeds the user's global generator.
    Mutant(
        "schedules/base.py",
        "(by_rates > 0) & torch.isclose(diffusion, by_rates, rtol=TOLERANCE)",
        "(diffusion > 0)",
        "tests/test_errors.py",
    ),
    # probes: one sphere for the whole batch, of radius √(B d).
    Mutant(
        "probes.py",
        "flat = _gaussian(shape, like, generator).reshape(*shape[:2], -1)",
        "flat = _gaussian(shape, like, generator).reshape(shape[0], -1)",
        "tests/test_probes.py",
    ),
    # The constant of the cosine transform has half of its variance.
    Mutant(
        "probes.py",
        "torch.where(index == 0, 2.0, 1.0)",
        "torch.where(index == 0, 1.0, 1.0)",
        "tests/test_probes.py",
    ),
    # A time that is NaN counts as inside the range.
    Mutant(
        "_checks.py",
        "not bool(((value >= low) & (value <= high)).all())",
        "bool(((value < low) | (value > high)).any())",
        "tests/test_errors.py",
    ),
    # Under inference_mode a loss keeps a graph.
    Mutant(
        "taylor/_torch.py",
        "with torch.inference_mode(False), torch.no_grad():",
        "with torch.inference_mode(False):",
        "tests/losses/test_random_options.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "torch.maximum(difference / 15, rough / 30)",
        "torch.maximum(difference / 7, rough / 30)",
        "tests/likelihood/test_multistep.py",
    ),
    # No Boole's rule; the error of step 1, which is mended, counts; what is known to be too large
    # counts less and less.
    Mutant(
        "likelihood/multistep.py",
        "if index == 4:",
        "if index == -1:",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "self.total = self.lowest = self.highest = torch.zeros_like(self.total)",
        "pass",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "share = share.clamp(min=least)",
        "pass",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "twice = place == stride * (runge_kutta + 1)",
        "twice = place == stride and not runge_kutta",
        "tests/likelihood/test_start.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "3 * runge_kutta * (1 + companion)",
        "3 * runge_kutta",
        "tests/likelihood/test_start.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "sorted((*span, coordinates.log_size))[1]",
        "coordinates.log_size",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "dist.all_reduce(most, dist.ReduceOp.MAX, group)",
        "dist.all_reduce(most, dist.ReduceOp.SUM, group)",
        "tests/likelihood/test_tolerance.py",
    ),
    Mutant(
        "likelihood/paths.py",
        "if not all(map(torch.equal, before, after)):",
        "if False:",
        "tests/likelihood/test_said.py",
    ),
    Mutant(
        "likelihood/job.py",
        "self.dequantization.draw(self.x, paths.coordinates, self.generator)",
        "self.dequantization.draw(self.x, paths.coordinates, None)",
        "tests/likelihood/test_random_settings.py",
    ),
    Mutant(
        "likelihood/ode.py",
        "latent, integral = (paths.x, -integral) if backwards else (x, integral)",
        "latent, integral = (paths.x if backwards else x), integral",
        "tests/likelihood/test_random_settings.py",
    ),
    # The difference of one sample with kinks counts for all.
    Mutant(
        "likelihood/ode.py",
        "coordinates.log_gaussian(latent, end) - paths.log_prior_at(latent)",
        "paths.log_prior_at(latent) - coordinates.log_gaussian(latent, end)",
        "tests/likelihood/test_ode.py",
    ),
    Mutant(
        "likelihood/dequantize.py",
        "prior_error = corrected.logsumexp(0) - log_density.detach().logsumexp(0)",
        'prior_error = stacked("prior_error").mean(0)',
        "tests/likelihood/test_ode.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "error = difference.abs() / 12",
        "error = difference.abs() / 100",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "q.diff(n=7, dim=0).norm(dim=0)",
        "q.diff(n=7, dim=0).norm(dim=0).amax()",
        "tests/likelihood/test_multistep.py",
    ),
    Mutant(
        "likelihood/multistep.py",
        "solver_error=solver_error.clamp(min=rounding(paths.dtype)),",
        "solver_error=solver_error,",
        "tests/likelihood/test_multistep.py",
    ),
    # The probes of the first rows, for those that are still on their way.
    Mutant(
        "likelihood/adaptive.py",
        "row_probes = None if probes is None else probes[:, rows]",
        "row_probes = None if probes is None else probes[:, : len(rows)]",
        "tests/likelihood/test_adaptive.py",
    ),
    Mutant(
        "likelihood/result.py",
        "float(nll.detach()[good].double().std()) / count**0.5",
        "float(nll.detach()[good].double().std()) / len(good) ** 0.5",
        "tests/likelihood/test_result.py",
    ),
    Mutant(
        "likelihood/variational.py",
        "integral_variance + draws.var(0) / at_start",
        "integral_variance + draws.var(0) / samples",
        "tests/likelihood/test_variational.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "level = self.levels + change",
        "level = self.levels",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "(draw[:, None] + GOLDEN * sample % 1) / count",
        "(draw[:, None] + 0 * sample) / count",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "(1 / self.place.flatten().bincount().double())[self.place]",
        "torch.ones_like(quantile)",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "return shares + shares.sum().clamp(min=1) / len(shares)",
        "return torch.ones_like(shares)",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "self.predictor.expected(schedule.log_sigma_hat(t) - change)",
        "self.predictor.expected(level - change)",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "        before.restore()\n",
        "        before.restore(generators=False)\n",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "return excess > max(FINE_ERRORS * error, FINE_MARGIN)",
        "return excess > FINE_ERRORS * error",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        " and not self._is_clear(own, self.linear)",
        "",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "if self._excess(losses, self.linear)[0] > CLOSE:",
        "if False:",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "changes <= BELIEVED.get(read.kind, 1)",
        "changes <= 1",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "return any(self._is_better(losses, self.linear, place) for place in places)",
        "return True",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "min(error, (FINE_ERRORS + ERRORS) * error**2 / -gain)",
        "error",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/wrapping.py",
        "limits = [excess + FINE_ERRORS * error]",
        "limits = [0.0]",
        "tests/diagnostics/test_wrapping.py",
    ),
    Mutant(
        "diagnostics/differences.py",
        "if not error <= TOLERANCE[self.precision]:",
        "if error > TOLERANCE[self.precision]:",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "diagnostics/differences.py",
        "jumps = bends[-1] > np.maximum(least, HALF * np.max(bends[-4:-1], axis=0))",
        "jumps = bends[-1] > np.maximum(least, 2 * np.max(bends[-4:-1], axis=0))",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "diagnostics/differences.py",
        "part = max((low, middle), (middle, high), key=error)",
        "part = min((low, middle), (middle, high), key=error)",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "diagnostics/differences.py",
        "if error(part) <= least[lower] and (bends[-1] <= least)[levels].all():",
        "if False:",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "diagnostics/values.py",
        "moves = places.roll(1), places[:1].expand_as(places), places[-1:].expand_as(places)",
        "moves = (places.roll(1),)",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "diagnostics/check.py",
        "torch.random.fork_rng(devices, device_type=",
        "torch.random.fork_rng(devices, False, device_type=",
        "tests/diagnostics/test_check.py",
    ),
    Mutant(
        "interop.py",
        'owner.alphas_cumprod, dtype=torch.float64, device="cpu").detach()',
        'owner.alphas_cumprod, device="cpu").detach().double()',
        "tests/interop/test_stand_ins.py",
    ),
    Mutant(
        "interop.py",
        "return model(x, timestep=t.to(x.dtype), **kwargs)",
        "return model(x, timestep=t, **kwargs)",
        "tests/interop/test_stand_ins.py",
    ),
    Mutant(
        "interop.py",
        'rescaled = 1000.0 / getattr(diffusion, "original_num_steps", steps)',
        "rescaled = 1000.0 / steps",
        "tests/interop/test_references.py",
    ),
    Mutant(
        "interop.py",
        "    if not (continuous and configured):\n",
        "    if not continuous:\n",
        "tests/interop/test_stand_ins.py",
    ),
    Mutant(
        "interop.py",
        "    return factor * (1 - t)\n",
        "    return 1 - factor * t\n",
        "tests/interop/test_one_expression.py",
    ),
    Mutant(
        "interop.py",
        "output=torch.neg if data_at == 1 else None",
        "output=torch.neg",
        "tests/interop/test_one_expression.py",
    ),
    Mutant(
        "model/posterior.py",
        "(products + jacobian_v) / 2",
        "products",
        "tests/model/test_posterior.py",
    ),
    Mutant(
        "model/posterior.py",
        "(matrices + matrices.mT) / 2",
        "matrices",
        "tests/model/test_posterior.py",
    ),
    Mutant(
        "model/posterior.py",
        "self.product(v, symmetric=False)).mean(0)",
        "self.product(v)).mean(0)",
        "tests/model/test_posterior.py",
    ),
    Mutant(
        "model/score_model.py",
        "return names <= {nn.Module.__module__}",
        "return True",
        "tests/model/test_score_model.py",
    ),
    Mutant(
        "model/score_model.py",
        "return -sigma / wronskian, b / wronskian",
        "return -sigma / wronskian, alpha / wronskian",
        "tests/model/test_posterior.py",
    ),
    # Conditions repeated sample by sample, and not distribution by distribution.
    Mutant(
        "likelihood/distribution.py",
        "return tensor.expand(outer + tensor.shape[len(batch) :])",
        "return tensor.repeat_interleave(outer.numel() // max(batch.numel(), 1), 0).reshape("
        "outer + tensor.shape[len(batch) :])",
        "tests/likelihood/test_distribution.py",
    ),
    Mutant(
        "likelihood/distribution.py",
        "t.to(dtype) if t.is_floating_point() else t",
        "t",
        "tests/likelihood/test_distribution.py",
    ),
    # An index that leaves what is not the nll as it was, and an interrupt in a second draw that
    # takes the batches of both for one.
    Mutant(
        "likelihood/result.py",
        "name: value[index] if isinstance(value, Tensor) else value",
        'name: value[index] if name == "nll" else value',
        "tests/likelihood/test_result.py",
    ),
    Mutant(
        "likelihood/job.py",
        "results = results[: len(results) // batches * batches] or results",
        "results = list(results)",
        "tests/likelihood/test_interrupt.py",
    ),
    Mutant(
        "likelihood/ode.py",
        '"latent": latent[: len(result.latent)]}',
        '"latent": latent}',
        "tests/likelihood/test_interrupt.py",
    ),
    # Samples outside the target count as failed, zeros as the tail of the weights, and the prior
    # of Pareto's k is left out.
    Mutant(
        "likelihood/weights.py",
        "failed = float(result.failed.double().mean())",
        "failed = float(log_weights.isneginf().double().mean())",
        "tests/likelihood/test_weights.py",
    ),
    Mutant(
        "likelihood/weights.py",
        "variance = torch.where(result.failed, 0.0, variance)",
        "pass",
        "tests/likelihood/test_weights.py",
    ),
    Mutant(
        "likelihood/weights.py",
        "torch.where(result.failed, 0.0, result._errors().detach())",
        "result._errors().detach()",
        "tests/likelihood/test_weights.py",
    ),
    Mutant(
        "likelihood/weights.py",
        "self.effective_sample_size < min(DOUBTED, count / 2)",
        "self.effective_sample_size < DOUBTED",
        "tests/likelihood/test_weights.py",
    ),
    Mutant(
        "likelihood/weights.py",
        "_pareto_k(self.normalized[self.normalized > 0])",
        "_pareto_k(self.normalized)",
        "tests/likelihood/test_weights.py",
    ),
    Mutant(
        "likelihood/weights.py",
        "(tail * shape + 10 * 0.5) / (tail + 10)",
        "shape",
        "tests/likelihood/test_weights.py",
    ),
    # A sample at 1e20 takes all of the evaluations.
    Mutant(
        "likelihood/adaptive.py",
        "rounding > solver_limit(paths.dimensions)",
        "rounding < 0",
        "tests/likelihood/test_adaptive.py",
    ),
    # With a graph, a sample that is lost is evaluated again once another is; the first without a
    # look at values.
    Mutant(
        "probes.py",
        "sum_elements(probes.square())",
        "sum_elements(probes.abs())",
        "tests/likelihood/test_paths.py",
    ),
    Mutant(
        "likelihood/paths.py",
        'self.due.discard("draws")',
        "pass",
        "tests/likelihood/test_said.py",
    ),
    Mutant(
        "likelihood/ode.py",
        "        (Cause.DIVERGENCE, ~integral.isfinite()),\n",
        "",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/ode.py",
        "solution.cause.masked_fill(~all_finite(paths.x), Cause.START)",
        "solution.cause",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/ode.py",
        "        (Cause.RANGE, ~all_finite(at_end)),\n",
        "",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/job.py",
        "cause.masked_fill(failed & holds & (cause == 0), value)",
        "cause.masked_fill(failed & holds, value)",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/adaptive.py",
        "reason = torch.where(reason == 0, why, reason)",
        "reason = why",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/adaptive.py",
        "cause = cause.masked_fill(~all_finite(noise), Cause.OUTPUT)",
        "cause = cause",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/adaptive.py",
        "reason.masked_fill(reason == 0, Cause.ARRIVAL).masked_fill(~stuck, 0)",
        "reason.masked_fill(~stuck, 0)",
        "tests/likelihood/test_failures.py",
    ),
    Mutant(
        "likelihood/paths.py",
        "nonfinite = nonfinite | ~all_finite(model.f(points))",
        "nonfinite = ~all_finite(model.f(points))",
        "tests/likelihood/test_graph.py",
    ),
    Mutant(
        "likelihood/paths.py",
        "nonfinite = nonfinite | ~finite",
        "nonfinite = ~finite",
        "tests/likelihood/test_graph.py",
    ),
    # The density of x_t for that of x_t/α.
    Mutant(
        "likelihood/dequantize.py",
        "/ mass) - start.alpha.log()",
        "/ mass) + start.alpha.log()",
        "tests/likelihood/test_bounds.py",
    ),
    # A network in the coordinates of a subspace.
    Mutant(
        "model/adapters.py",
        "eigenvalues > 0.5",
        "eigenvalues > 1.5",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "P @ (weights[:, None] * P)",
        "P @ P",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "        Q = Q * torch.where(weights @ Q < 0, -1.0, 1.0)\n",
        "",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "not (projected(v) - v @ Q @ Q.mT).abs().amax() < ROUNDING",
        "not (P - Q @ Q.mT).abs().amax() < ROUNDING",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "            if off > max(OFF",
        "            if off < 0 * max(OFF",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "        with full:\n            return",
        "        if full:\n            return",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        '{**state, "_copies": {}}',
        "state",
        "tests/model/test_adapters.py",
    ),
    Mutant(
        "model/adapters.py",
        "return self.network._innermost if isinstance(self.network, Wrapper) else self.network",
        "return self.network",
        "tests/model/test_score_model.py",
    ),
    # A copy of a constant that a mode or transform made.
    Mutant(
        "_checks.py",
        "if torch.compiler.is_compiling() or owns_values(copy):",
        "if True:",
        "tests/schedules/test_discrete.py",
    ),
    Mutant(
        "_checks.py",
        "    with outside_inference_mode():\n        copy = make()",
        "    if True:\n        copy = make()",
        "tests/model/test_adapters.py",
    ),
    # A summary that takes the bound's draws for probes, or hides the prior; a synonym of another
    # prediction.
    Mutant(
        "likelihood/result.py",
        'source = "draws" if self.products is None else "probes"',
        'source = "probes"',
        "tests/likelihood/test_variational.py",
    ),
    Mutant(
        "likelihood/result.py",
        "self.prior_size >= SHOWN",
        "self.prior_size < SHOWN",
        "tests/likelihood/test_result.py",
    ),
    Mutant(
        "model/score_model.py",
        '"v_prediction": "v"',
        '"v_prediction": "velocity"',
        "tests/model/test_score_model.py",
    ),
    Mutant(
        "taylor/composites.py",
        "ops.unsqueeze(x1, -2), ops.unsqueeze(x2, -3)",
        "ops.unsqueeze(x1, -3), ops.unsqueeze(x2, -2)",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/composites.py",
        "ops.where(ops.lt(far, delta), curved, straight)",
        "ops.where(ops.le(far, delta), curved, straight)",
        "tests/taylor/test_edges.py",
    ),
    Mutant(
        "taylor/composites.py",
        "[count // 2, count // 2, count % 2], dim)",
        "[count // 2, count - count // 2, 0], dim)",
        "tests/taylor/test_calls.py",
    ),
    Mutant(
        "taylor/jets.py",
        "if NO_FORWARD not in str(error):",
        "if NO_FORWARD in str(error):",
        "tests/taylor/test_directional.py",
    ),
]


def plant(mutant: Mutant, folder: Path) -> None:
    """Copy the package into `folder`, with the fault."""
    copy = folder / "hosm_losses"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: expected {mutant.old!r} once.")
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def first_failure(folder: Path, *arguments: str) -> str | None:
    """The first test that fails with the package in `folder`, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
    command += ["--tb=no", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder), "HYPOTHESIS_PROFILE": "unshrunk"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if run.returncode not in (0, 1) and not failed:
        raise SystemExit(run.stdout + run.stderr)
    return failed[0].split(" - ")[0] if failed else None


def hunt(mutant: Mutant, named_only: bool) -> str | None:
    """The test that kills the mutant, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        plant(mutant, Path(scratch))
        killer = first_failure(Path(scratch), *mutant.tests.split())
        if killer is None and not named_only:
            killer = first_failure(Path(scratch), "-n", "auto", "tests")
    return killer


def main() -> None:
    """Run the mutants whose numbers are given, or all, and print what kills each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*")
    parser.add_argument("--named-only", action="store_true", help="run the named tests alone")
    options = parser.parse_args()
    numbers = options.numbers or range(len(MUTANTS))
    survivors = 0
    for number in numbers:
        killer = hunt(MUTANTS[number], options.named_only)
        survivors += killer is None
        print(f"{number:3} {MUTANTS[number].file}: {killer or 'SURVIVED'}", flush=True)
    print(f"{len(numbers) - survivors} of {len(numbers)} killed")


if __name__ == "__main__":
    main()

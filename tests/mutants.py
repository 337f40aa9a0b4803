"""Faults planted in the source one at a time, each of which the fast tests have to notice.

    python -m tests.mutants [NUMBER ...] [--named-only]

For each mutant a copy of the package has `old` replaced by `new`. The named tests run first; the
rest of the fast tests run only for mutants which those let through. `.ci/mutants` writes the
outcome to `tests/mutants.txt`. Whoever rewrites a line of the source rewrites its mutant.

`FAULTS` is written as a diff, of lines or parts of them: a file and the tests that notice what is
planted there, then `old` after minuses and `new` after pluses.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import groupby
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


FAULTS = r"""
taylor/pointwise.py taylor/test_calls.py
- collect(2 * tangents * b_tangents, pairs)
+ collect(2 * tangents * tangents, pairs)
- yield density * x * (square - 4)
+ yield density * (square - 4)
taylor/pointwise.py taylor/test_edges.py
- straight_on = scaled > threshold
+ straight_on = x > threshold
taylor/matrices.py taylor/test_matrices.py
- (products * products.mT).sum((-2, -1))
+ (products * products).sum((-2, -1))
- seconds = seconds + collect(firsts.square(), A.pairs)[: len(seconds)]
+
- inverse = inverse.where(info[..., None, None] == 0, torch.nan)
+ inverse = inverse.where(info[..., None, None] == 0, 0.0)
- with without_autocast(a.device.type):
+ if True:
- ((change + change.mT) / 2)
+ change
taylor/jets.py taylor/test_directional.py
- first.movedim(0, -1).reshape(
+ first.reshape(
taylor/attention.py taylor/test_attention_masks.py
- return (mixed if mask is None else ops.mul(mixed, _allows_any(mask))), weights
+ return mixed, weights
taylor/products.py taylor/test_edges.py
-     with without_autocast(others[0].device.type):
-         return form[place](*others)
+     return form[place](*others)
taylor/products.py taylor/test_calls.py
- return with_bias(convolved, bias, x.shape[0])
+ return with_bias(convolved, bias, len(samples))
taylor/norms.py taylor/test_pullbacks.py
- along = -3 * _third_along(x.along, y.along, y.along, xy, xy, yy)
+ along = -3 * _third_along(x.along, y.along, y.along, xy, yy, yy)
- along + self.stack(seconds).along
+ along
taylor/norms.py taylor/test_calls.py
- torch.cat([torch.zeros_like(rho), c.along])
+ torch.cat([torch.ones_like(rho), c.along])
taylor/pointwise.py taylor/test_calls.py
- s, t1, value=2)  # −1
+ s, t1, value=1)  # −1
taylor/primitives.py taylor/test_primitives.py
- return input.copy_(result) if inplace else result
+ return result
taylor/norms.py taylor/test_primitives.py
- norm(ops.value(x), mean, variance, None, None, True, *options)
+ norm(ops.value(x).cos(), mean, variance, None, None, True, *options)
taylor/linear.py taylor/test_edges.py
- dropped = x.like(x.stack * function(torch.ones_like(x.stack[0]), p, True))
+ dropped = x.like(function(x.stack, p, True))
taylor/linear.py taylor/test_calls.py
- stack = torch.stack([component[index] for component in x.stack.unbind()])
+ stack = x.stack[(slice(None), *parts)]
taylor/attention.py taylor/test_pullbacks.py
- add_products(of_weights, again[:1], total(value), -1)
+ add_products(of_weights, again[:1], total(weights * a), -1)
taylor/in_place.py taylor/test_in_place.py
- values += [0] * (count - len(values))
+ values += values[:1] * (count - len(values))
taylor/memory.py taylor/test_in_place.py
- if jet.memory is not None and len(alive(jet.memory)) > 1:
+ if False:
- if versions([value]) != [version]:
+ if False:
taylor/linear.py taylor/test_in_place.py
- isinstance(part, list) or getattr(part, "ndim", 0) for part in parts
+ isinstance(part, list | Tensor) for part in parts
taylor/jets.py taylor/test_constants.py
- refuse_constant(func, floats[0])
+ pass
taylor/primitives.py taylor/test_constants.py
- refuse_constant(func, result)
+ pass
taylor/jets.py taylor/test_complex.py
- (func not in OF_COMPLEX or len(jets) > 1)
+ func not in OF_COMPLEX
taylor/jets.py taylor/test_calls.py
- parts[1] = pytree.tree_map(partial(collect, pairs=pairs), parts[1])
+ parts[1] = pytree.tree_map(partial(collect, pairs="squares"), parts[1])
taylor/composites.py taylor/test_edges.py
- short = ops.value(length) * largest <= eps
+ short = ops.value(length) <= eps
taylor/linear.py taylor/test_calls.py
- any is_nonzero floor ceil round
+ any is_nonzero floor ceil round frac
taylor/linear.py taylor/test_jet.py
- lambda cotangent: guarded(cotangent[0])
+ lambda cotangent: guarded(cotangent.sum(0))
taylor/jets.py taylor/test_directional.py
-     stack = stack if torch.is_grad_enabled() else stack.detach()
+
- second = jet(function, x, directions, "sum")
+ second = jet(function, x, directions, "squares")
taylor/linear.py taylor/test_in_place.py
- linear(_move, _names, view=_table is VIEWS)
+ linear(_move, _names)
derivatives/engines.py derivatives/test_backward.py
-         refuse_dropped(vjp_c, wanted)
-         return vjp_c, value
+         return vjp_c, value
derivatives/engines.py test_training_loops.py
- if not in_turn and internals.checkpoint_hook(internals.ANY_CHECKPOINT) is None:
+ if not torch.compiler.is_compiling():
taylor/registry.py derivatives/test_engines_agree.py
- if not same or versions(incoming) != before:
+ if not same:
taylor/primitives.py taylor/test_primitive_mode.py
- _SafePrimitives(tables[-1]) if tables else nullcontext()
+ nullcontext()
taylor/primitives.py test_transforms.py
- multi_head_attention_forward mish")
+ mish")
-         if func == _DATA and is_traced():  # which is shallow, as .detach_() is
-             return args[0].detach()
+
taylor/attention.py taylor/test_calls.py
- key, value = (ops.repeat_interleave(tensor, times, -3) for tensor in (key, value))
+ key, value = (ops.cat([tensor] * times, -3) for tensor in (key, value))
taylor/composites.py taylor/test_primitives.py
- PRIMITIVES[function] = partial(_primitive, function, body)
+ PRIMITIVES[function] = function
taylor/norms.py taylor/test_calls.py
- return _batch_norm(ops, x, running_mean, running_var, weight, bias, eps=eps)
+ return _batch_norm(ops, x, running_mean, running_var, weight, bias)
taylor/attention.py taylor/test_attention_masks.py
- return attn_mask.masked_fill(~rows, 0.0).to(dtype)
+ return attn_mask.to(dtype)
derivatives/kinks.py derivatives/test_kinks.py
- between, nodes = set[Any](), [internals.gradient_node(point)]
+ between, nodes = set[Any](above), []
- update((2, 3) if jumping or order == 3 else (2,))
+ update((2, 3))
- if name == "relu" or n % 2]
+ ]
derivatives/engines.py losses/test_paired.py
- vjp(derived, point, graph=wanted or push)
+ vjp(derived, point, graph=push)
# A loss of a frozen network that can be passed back, and trains nothing.
derivatives/engines.py losses/test_frozen.py
- seen, nodes = {point_node}, []
+ seen, nodes = set(), []
- graph=wanted or push)
-     wanted = wanted and may_train(value, x, point)
+ graph=wanted or push)
# The same of a likelihood.
derivatives/engines.py likelihood/test_graph.py
-         wanted = wanted and may_train(value, x, point)
+
taylor/memory.py taylor/test_recompute.py
- further = pullbacks[1:] if needed[0] else ()
+ further = pullbacks[1:]
derivatives/select.py taylor/test_primitive_mode.py
-             before.restore()
-             self
+             self
derivatives/select.py derivatives/test_choice.py
- self.kind = (*kind, x.dtype,
+ self.kind = (x.dtype,
derivatives/select.py losses/test_dropout.py
- copied = order == 3
+ copied = False
derivatives/select.py derivatives/test_choice.py
- if not any(self.surroundings) and not isinstance(error, RecursionError):
+ if not isinstance(error, RecursionError):
-             return
-         before = NetworkState(
+             pass
+         before = NetworkState(
- sure = sure or call in self.memory.failed
+ sure = True
derivatives/checkpointing.py taylor/test_in_place.py
-         if any(inputs[place].stack is not entries[place] for place in jets):
-             raise DerivativeError(CHANGED_ARGUMENT)
+
# losses: from four probes on, the two estimates that are multiplied have probes in common.
losses/paired.py losses/test_random_options.py
- mean_over_probes(estimates[half:])
+ mean_over_probes(estimates[1:])
# The value of order three stays, its gradient goes into the lower orders.
losses/terms.py losses/test_random_options.py
- scale_rows(2 * ell_dot_v, Dv_plus_v.detach())
+ scale_rows(2 * ell_dot_v, Dv_plus_v)
# Averaged targets: each sample counts itself twice in a batch, the moments are not
# about the mean, float32 loses close neighbours, data far from zero their digits, and samples
# of the reference are refused.
losses/targets.py losses/test_random_options.py
- .diagonal(0, 1, 2).fill_(-torch.inf)
+ .diagonal(0, 1, 2).fill_(0.0)
losses/targets.py losses/test_averaged_targets.py
- (v * (self.scale * self.data - self.mean))
+ (v * self.scale * self.data)
-  - inner(v, C2v) * self.mean
+
_checks.py losses/test_averaged_targets.py
- torch.float32 if tensor.device.type == "mps" else torch.float64
+ torch.float32
losses/targets.py losses/test_averaged_targets.py
- data, reference = (data - origin).repeat(count, 1), reference - origin
+ data = data.repeat(count, 1)
- slack = logits[:, :-1].amax(1), 1 + 1e-12 * (scale * data).square().sum(1)
+ slack = logits[:, :-1].amax(1), 1.0
# Scores: the own ones choose C, a part of order two, three or of the sums over j is left out,
# float32 takes the digits of what cancels, padded coordinates and conditions are not looked
# at, and wrong temperatures, correlated frames, subspaces or padding are not noticed.
losses/targets.py losses/test_random_options.py
- (squares.sum(0) - squares) / max(count - 1, 1)
+ squares.mean(0).expand_as(squares)
- Cv + (ell_v * c + c_v * ell + p + q) / 2
+ Cv + (ell_v * c + p + q) / 2
- of_ell = c_v.square() - inner(v, Cv) +
+ of_ell = c_v.square() +
- (ell_v + 2 * c_v) * q - ell_v * p
+ 2 * c_v * q
losses/targets.py losses/test_target_scores.py
- (v - C2v).reshape(probe.shape).to(probe.dtype)
+ probe - C2v.reshape(probe.shape).to(probe.dtype)
losses/objective.py losses/test_target_scores.py
- moments.mean.reshape(eps.shape)
+ moments.mean.reshape(eps.shape).to(eps.dtype)
losses/targets.py losses/test_random_options.py
- information = torch.where(information > 0, information, math.inf)
+ pass
losses/targets.py losses/test_averaged_targets.py
- averaged = targets.averaged if isinstance(targets, TargetScores) else targets
+ averaged = targets
losses/score_check.py losses/test_score_check.py
- <= 5 * error
+ <= 50 * error
- runs, total = min(RUNS, len(x)), x.sum(0)
+ runs, total = len(x), x.sum(0)
- weights = 1 / (of_runs.sum(0) - of_runs).square()
+ weights = torch.ones_like(of_runs)
- .sum(2) / 2 + x.shape[2])
+ .sum(2) / 2)
- dimension < elements and not matrix
+ False
- .cpu()) > 1).sum())
+ .cpu()) > 0).sum())
- .any(1)  # without padding
+ .any(1) | True
- if len(x) <= count or count > LARGEST:
+ if count > LARGEST:
- 5 * error > WRONG * wanted
+ error > wanted
# A small sample seems to have wrong scores; rounding counts as information, that of scores
# which were converted since too; a matrix may have negative eigenvalues.
losses/score_check.py losses/test_score_check.py
- ((total - own.sum(0)) / (len(x) - len(own)) - own)
+ (total / len(x) - own)
losses/targets.py losses/test_target_scores.py
- torch.where(eigenvalues > d * eps * eigenvalues[-1], eigenvalues, 0.0)
+ eigenvalues
- max(of_scores**2, of_F, torch.finfo(torch.float32).eps)
+ max(of_scores**2, of_F)
- if least < -slack * largest or skew >
+ if skew >
losses/weighting.py losses/test_weighting_tables.py
- (schedule.t_max - schedule.t_min + indices) * rate
+ (schedule.t_max - schedule.t_min) * rate
# A fraction's higher terms take the factors of other samples.
losses/objective.py losses/test_random_options.py
- of_higher = of_higher[rows]
+ of_higher = of_higher[: len(rows)]
# A trace alone, and a ramp at order three, are not needed or cost all orders.
losses/options.py losses/test_ramps.py
- (is_used(weights[1]) or is_used(weights[2]))
+ is_used(weights[1])
- if order == 3 and not is_used(weights[3]):
+ if order == 3 and weights[3] is None:
losses/objective.py losses/test_ramps.py
- bound, checked, needed_order(options.order, checked)
+ bound, checked, options.order
losses/objective.py losses/test_random_options.py
- torch.randperm(len(x), device=x.device, **generator_kwargs(generator))
+ torch.randperm(len(x), device=x.device)
# model: copies of a batch with the conditions and times of other samples.
model/score_model.py test_transforms.py
- self.primitives and in_functorch() else
+ not self.primitives and in_functorch() else
model/bound.py losses/test_random_options.py
- return tensor.repeat(count, *(1,) * (tensor.ndim - 1))
+ return tensor.repeat_interleave(count, 0)
# f counts q x, which the noise leaves out.
losses/terms.py losses/test_random_options.py
- derived = model.of_f(derivatives, None, w)
+ derived = model.of_f(derivatives, batch.x, w)
# Indices of a table rounded to the precision of half data.
model/score_model.py schedules/test_discrete.py test_half_precision.py
- t.to(torch.promote_types(like.dtype, torch.float32))
+ t.to(like.dtype)
# A network changes in place what all samples share, and meets it changed in its next call.
model/bound.py model/test_conditions.py
- map_tensors(self.kwargs, Tensor.clone)
+ per_sample(self.kwargs, lambda _, tensor: tensor.clone())
schedules/discrete.py test_errors.py
- scaled and min(beta_start, beta_end) > 0
+ scaled
schedules/discrete.py schedules/test_base.py
- torch.randint(len(self.alphas_cumprod), shape, **options)
+ torch.randint(len(self.alphas_cumprod) - 1, shape, **options)
schedules/base.py losses/test_weighting_tables.py
- return t.round().long() if self.integer_time else t
+ return t.long() if self.integer_time else t
# Bisection stops at half of the digits next to t_min.
schedules/base.py schedules/test_base.py
- range(2 * -int(math.log2(torch.finfo(target.dtype).eps)))
+ range(-int(math.log2(torch.finfo(target.dtype).eps)))
# 1 - α² by a difference has no digits left near the data.
schedules/continuous.py schedules/test_base.py
- return -torch.expm1(-b)
+ return 1 - torch.exp(-b)
- return 2 * torch.exp(-b / 2) * torch.sinh(b / 2)
+ return 1 - torch.exp(-b)
- torch.log1p(h + h.square() / (1 + torch.sqrt(1 + h.square())))
+ torch.log(h + torch.sqrt(1 + h.square()))
- h = h.clamp(max=1e18)
+ pass
schedules/base.py test_errors.py
- (by_rates > 0) & torch.isclose(diffusion, by_rates, rtol=TOLERANCE)
+ (diffusion > 0)
# probes: one sphere for the whole batch, of radius √(B d).
probes.py test_probes.py
- flat = _gaussian(shape, like, generator).reshape(*shape[:2], -1)
+ flat = _gaussian(shape, like, generator).reshape(shape[0], -1)
- torch.where(index == 0, 2.0, 1.0)
+ torch.where(index == 0, 1.0, 1.0)
_checks.py test_errors.py
- not bool(((value >= low) & (value <= high)).all())
+ bool(((value < low) | (value > high)).any())
taylor/_torch.py losses/test_random_options.py
- with torch.inference_mode(False), torch.no_grad():
+ with torch.inference_mode(False):
likelihood/multistep.py likelihood/test_multistep.py
- torch.maximum(difference / 15,
+ torch.maximum(difference / 7,
# No Boole's rule; the error of step 1, which is mended, counts; what is known to be too large
# counts less and less.
- if index == 4:
+ if index == -1:
- self.effects.pop()
+ self.effects[-1]
- share = share.clamp(min=min(1.0, 2 * (index - 4) / self.steps) ** 2)
+ pass
# No secant at the start; order five where the differences alternate.
- self._move_slope(self.secant * self.correction)
+ pass
- self._turned(3) & self._turned(4)
+ self._turned(3) & ~self._turned(3)
# All of order five where the differences grow.
- weight / (1 + ratio.square())
+ weight / (1 + 0 * ratio)
- rule = order, runge_kutta, steps < ORDER_FIVE
+ rule = order, runge_kutta, False
likelihood/multistep.py likelihood/test_start.py
- twice = place == stride * (runge_kutta + 1)
+ twice = place == stride and not runge_kutta
- 3 * runge_kutta * (1 + companion)
+ 3 * runge_kutta
likelihood/multistep.py likelihood/test_multistep.py
- sorted((*span, coordinates.log_size))[1]
+ coordinates.log_size
- torch.sqrt(t / (1 + torch.sqrt(1 - t)))
+ torch.sqrt(t / 2)
- is_flow and coordinates.model.prediction == "velocity"
+ coordinates.model.prediction == "velocity"
- u = centre + torch.log(square * (2 - square))
+ u = torch.log(square * (2 - square))
likelihood/ode.py likelihood/test_tolerance.py
- dist.all_reduce(most, dist.ReduceOp.MAX, solver.group)
+ dist.all_reduce(most, dist.ReduceOp.SUM, solver.group)
- [torch.cat(places).argsort()]
+ [torch.cat(places)]
- again = error > tolerance
+ again = (error > tolerance).any().expand_as(rows)
likelihood/paths.py likelihood/test_said.py
- if not all(map(torch.equal, before, after)):
+ if False:
likelihood/job.py likelihood/test_random_settings.py
- self.dequantization.draw(self.x, paths.coordinates, self.generator)
+ self.dequantization.draw(self.x, paths.coordinates, None)
# Schedules of which only σ is learnt are let through.
likelihood/job.py test_errors.py
- any(part.requires_grad for part in parts)
+ parts[0].requires_grad
likelihood/ode.py likelihood/test_random_settings.py
- latent, integral = (paths.x, -integral) if backwards else (x, integral)
+ latent, integral = (paths.x if backwards else x), integral
likelihood/ode.py likelihood/test_ode.py
- coordinates.log_gaussian(latent, end) - paths.log_prior_at(latent)
+ paths.log_prior_at(latent) - coordinates.log_gaussian(latent, end)
likelihood/ode.py likelihood/test_sample.py
- error = torch.maximum(difference.abs(), back.solver_error)
+ error = back.solver_error
- solver_error=error.masked_fill(back.failed, math.inf),
+ solver_error=error.nan_to_num(0.0),
likelihood/dequantize.py likelihood/test_ode.py
- prior_error = corrected.logsumexp(0) - log_density.detach().logsumexp(0)
+ prior_error = stacked("prior_error").mean(0)
likelihood/multistep.py likelihood/test_multistep.py
- q.diff(n=7, dim=0).norm(dim=0)
+ q.diff(n=7, dim=0).norm(dim=0).amax()
- (solver_error + rounded).clamp(min=rounding(paths.dtype)),
+ solver_error + rounded,
likelihood/adaptive.py likelihood/test_adaptive.py
- row_probes = None if probes is None else probes[:, rows]
+ row_probes = None if probes is None else probes[:, : len(rows)]
- probes, tolerance / FINER, coarse.cause > 0)
+ probes, tolerance / FINER)
- torch.finfo(torch.promote_types(dtype, torch.float32)).eps
+ torch.finfo(dtype).eps
likelihood/result.py likelihood/test_result.py
- float(nll.detach()[good].double().std()) / count**0.5
+ float(nll.detach()[good].double().std()) / len(good) ** 0.5
likelihood/variational.py likelihood/test_variational.py
- integral_variance + draws.var(0) / at_start
+ integral_variance + draws.var(0) / samples
diagnostics/wrapping.py diagnostics/test_wrapping.py
- level = self.levels + change
+ level = self.levels
- (draw[:, None] + GOLDEN * sample % 1) / count
+ (draw[:, None] + 0 * sample) / count
- (1 / self.place.flatten().bincount().double())[self.place]
+ torch.ones_like(quantile)
- return shares + shares.sum().clamp(min=1) / len(shares)
+ return torch.ones_like(shares)
- self.predictor.expected(schedule.log_sigma_hat(t) - change)
+ self.predictor.expected(level - change)
-     finally:
-         before.restore()
+     finally:
+         before.restore(generators=False)
-             before.restore()
-             if count
+             if count
- rows = (multiples % 1).argsort()[:count]
+ rows = multiples.argsort()[:count]
- seconds = min(seconds, time.perf_counter() - start)
+ seconds = time.perf_counter()
- return excess > max(FINE_ERRORS * error, FINE_MARGIN)
+ return excess > FINE_ERRORS * error
-  and not self._is_clear(own, self.linear)
+
- if self._excess(losses, self.linear)[0] > CLOSE:
+ if False:
- changes <= BELIEVED.get(read.kind, 1)
+ changes <= 1
- return any(self._is_better(losses, self.linear, place) for place in places)
+ return True
- min(error, (FINE_ERRORS + ERRORS) * error**2 / -gain)
+ error
- limits = [excess + FINE_ERRORS * error]
+ limits = [0.0]
diagnostics/differences.py diagnostics/test_check.py
- if not error <= TOLERANCE[self.precision]:
+ if error > TOLERANCE[self.precision]:
- jumps = bends[-1] > np.maximum(least, HALF * np.max(bends[-4:-1], axis=0))
+ jumps = bends[-1] > np.maximum(least, 2 * np.max(bends[-4:-1], axis=0))
- part = max((low, middle), (middle, high), key=error)
+ part = min((low, middle), (middle, high), key=error)
- if error(part) <= least[lower] and (bends[-1] <= least)[levels].all():
+ if False:
diagnostics/values.py diagnostics/test_check.py
- moves = places.roll(1), places[:1].expand_as(places), places[-1:].expand_as(places)
+ moves = (places.roll(1),)
diagnostics/check.py diagnostics/test_check.py
- fork_rng(device),
+ torch.enable_grad(),
interop.py interop/test_stand_ins.py
- owner.alphas_cumprod, dtype=torch.float64, device="cpu").detach()
+ owner.alphas_cumprod, device="cpu").detach().double()
- return model(x, timestep=t.to(x.dtype), **kwargs)
+ return model(x, timestep=t, **kwargs)
interop.py interop/test_references.py
- rescaled = 1000.0 / getattr(diffusion, "original_num_steps", steps)
+ rescaled = 1000.0 / steps
interop.py test_errors.py
- if stages > 1:
+ if stages > 3:
- any(part in name for part in JUMPS)
+ name in JUMPS
interop.py interop/test_stand_ins.py
- if not (continuous and configured):
+ if not continuous:
interop.py interop/test_one_expression.py
- return factor * (1 - t)
+ return 1 - factor * t
- output=torch.neg if data_at == 1 else None
+ output=torch.neg
model/posterior.py model/test_posterior.py
- (products + jacobian_v) / 2
+ products
- (matrices + matrices.mT) / 2
+ matrices
- self.product(v, symmetric=False)).mean(0)
+ self.product(v)).mean(0)
model/score_model.py model/test_score_model.py
- return names <= {nn.Module.__module__}
+ return True
model/score_model.py model/test_posterior.py
- return -sigma / wronskian, b / wronskian
+ return -sigma / wronskian, alpha / wronskian
# Conditions repeated sample by sample, and not distribution by distribution.
likelihood/distribution.py likelihood/test_distribution.py
- return tensor.expand(outer + tensor.shape[len(batch) :])
+ return tensor.repeat_interleave(outer.numel() // max(batch.numel(), 1), 0).reshape(
+     outer + tensor.shape[len(batch) :])
- t.to(dtype) if t.is_floating_point() else t
+ t
# An index that leaves what is not the nll as it was, and an interrupt in a second draw that
# takes the batches of both for one.
likelihood/result.py likelihood/test_result.py
- name: value[index] if isinstance(value, Tensor) else value
+ name: value[index] if name == "nll" else value
likelihood/job.py likelihood/test_interrupt.py
- results = results[: len(results) // batches * batches] or results
+ results = list(results)
likelihood/ode.py likelihood/test_interrupt.py
- "latent": latent[: len(result.latent)]}
+ "latent": latent}
# A note where no batch_shape is missing; moments that are infinite; other data taken for images.
likelihood/distribution.py likelihood/test_distribution.py
- if shape and not self.batch_shape:
+ if not self.batch_shape:
likelihood/solvers.py test_errors.py
- (numbers > least) & (numbers < math.inf)
+ (numbers > least)
likelihood/dequantize.py likelihood/test_said.py
- and (k - levels).abs().max() < 1e-3
+
- len(levels.unique()) > 16
+ len(levels.unique()) > 2
- 127.5 * (first + 1)
+ 127.5 * first
# Samples outside the target count as failed.
likelihood/weights.py likelihood/test_weights.py
- bad = (~failed & ~(values < math.inf))
+ bad = (~(values < math.inf))
- bool(self.log_weights.isneginf().all())
+ False
- * math.isfinite(e)
+
- failed = float(result.failed.double().mean())
+ failed = float(log_weights.isneginf().double().mean())
- variance = torch.where(result.failed, 0.0, variance)
+ pass
- torch.where(result.failed, 0.0, result._errors().detach())
+ result._errors().detach()
- self.effective_sample_size < count / 4
+ self.effective_sample_size < count / 2
- w = torch.cat([self.normalized, self.normalized.max()[None]])
+ w = self.normalized
- c = math.cbrt(1 - gamma * u)
+ c = 1.0
# A sample at 1e20 takes all of the evaluations.
likelihood/adaptive.py likelihood/test_adaptive.py
- rounding > solver_limit(paths.dimensions)
+ rounding < 0
probes.py likelihood/test_paths.py
- sum_elements(probes.square())
+ sum_elements(probes.abs())
likelihood/paths.py likelihood/test_said.py
- self.due.discard("draws")
+ pass
likelihood/ode.py likelihood/test_failures.py
-         (Cause.DIVERGENCE, ~integral.isfinite()),
+
- solution.cause.masked_fill(~all_finite(paths.x), Cause.START)
+ solution.cause
-         (Cause.RANGE, ~all_finite(at_end)),
+
likelihood/job.py likelihood/test_failures.py
- cause.masked_fill(failed & holds & (cause == 0), value)
+ cause.masked_fill(failed & holds, value)
likelihood/adaptive.py likelihood/test_failures.py
- reason = torch.where(reason == 0, why, reason)
+ reason = why
- cause = cause.masked_fill(~all_finite(noise), Cause.OUTPUT)
+ cause = cause
- reason.masked_fill(reason == 0, Cause.ARRIVAL).masked_fill(~stuck, 0)
+ reason.masked_fill(~stuck, 0)
likelihood/paths.py likelihood/test_graph.py
- nonfinite = nonfinite | ~all_finite(model.f(points))
+ nonfinite = ~all_finite(model.f(points))
- nonfinite = nonfinite | ~finite
+ nonfinite = ~finite
# The density of x_t for that of x_t/α.
likelihood/dequantize.py likelihood/test_bounds.py
- / mass) - start.alpha.log()
+ / mass) + start.alpha.log()
model/adapters.py model/test_adapters.py
- eigenvalues > 0.5
+ eigenvalues > 1.5
- P @ (weights[:, None] * P)
+ P @ P
-         Q = Q * torch.where(h @ Q < 0, -1.0, 1.0)
+
- not (projected(v) - v @ Q @ Q.mT).abs().amax() < ROUNDING
+ not (P - Q @ Q.mT).abs().amax() < ROUNDING
- if off > max(OFF
+ if off < 0 * max(OFF
-         with full:
-             return
+         if full:
+             return
- {**state, "_copies": {}}
+ state
- (0.1 + h).cumsum(0)
+ n
- torch.where(h @ Q
+ torch.where(n @ Q
- - Q).abs().amax() < ROUNDING
+ - Q).abs().amax() < 2
- self._basis, self._copies = Q, {}
+ self._basis = Q
model/adapters.py model/test_score_model.py
- return self.network._innermost if isinstance(self.network, Wrapper) else self.network
+ return self.network
# A copy of a constant that a mode or transform made.
_checks.py schedules/test_discrete.py
- if torch.compiler.is_compiling() or owns_values(copy):
+ if True:
_checks.py model/test_adapters.py
-     with outside_inference_mode():
-         copy = make()
+     if True:
+         copy = make()
# A summary that takes the bound's draws for probes, or hides the prior; a synonym of another
# prediction.
likelihood/result.py likelihood/test_variational.py
- source = "draws" if self.products is None else "probes"
+ source = "probes"
likelihood/result.py likelihood/test_result.py
- self.prior_size >= SHOWN
+ self.prior_size < SHOWN
model/score_model.py model/test_score_model.py
- "v_prediction": "v"
+ "v_prediction": "velocity"
taylor/composites.py taylor/test_calls.py
- ops.unsqueeze(x1, -2), ops.unsqueeze(x2, -3)
+ ops.unsqueeze(x1, -3), ops.unsqueeze(x2, -2)
taylor/composites.py taylor/test_edges.py
- ops.where(ops.lt(far, delta), curved, straight)
+ ops.where(ops.le(far, delta), curved, straight)
taylor/composites.py taylor/test_calls.py
- [count // 2, count // 2, count % 2], dim)
+ [count // 2, count - count // 2, 0], dim)
taylor/jets.py taylor/test_directional.py
- if NO_FORWARD not in str(error):
+ if NO_FORWARD in str(error):
# Pairs: the halves share their noise, their rows or their conditions are of other samples, or what
# is of a sample is of a row.
losses/objective.py losses/test_antithetic.py
- torch.cat([eps, -eps]) if options.antithetic else eps
+ torch.cat([eps, eps]) if options.antithetic else eps
- torch.cat([rows, batch + rows])
+ torch.cat([rows, rows])
- term.reshape(2, -1).mean(0)
+ term.reshape(-1, 2).mean(1)
- return torch.cat([v, v], 1)
+ return v.repeat_interleave(2, 1)
- _of_samples(DSMTerms(first_term(residual, batch.dimensions)), options).first
+ first_term(residual[:, : len(batch.x) // (1 + options.antithetic)], batch.dimensions)
- check_result(loss, terms, time)
+ check_result(loss, terms, batch.t)
- if t is None or noise is None:
+ if False:
losses/targets.py losses/test_antithetic.py
- mask.repeat(count, 1)
+ mask.repeat_interleave(count, 0)
- .unflatten(0, (count, -1)).diagonal(0, 1, 2)
+ .diagonal()
# Learnt times: another density than the factor says, another square, or a trace left behind.
losses/times.py losses/test_times.py
- (1 - FLOOR) * m / (masses * m).sum()
+ (1 - FLOOR) * m / m.mean()
- torch.searchsorted(above / total, unit, right=True)
+ (unit * BINS).long()
- (above[bins] - total * unit) / weights[bins]
+ (above[bins] - total * unit) / weights.max()
- torch.minimum(torch.maximum(index - 1, start), stop - 1)
+ start
- with fork_rng(device), outside
+ with outside
- unit[order[:count]] = (torch.arange(count, device=device) + unit[:count]) / count
+ pass
- torch.where(bins.masses > 0, 1 / bins.masses, 0.0)
+ torch.ones_like(bins.masses)
- module.training = False
+ module.training = True
- squares @ factor.flatten()
+ squares.sum()
- torch.float32).sqrt() + small
+ torch.float32).sqrt()
- means / means[seen].mean()
+ means / means.mean()
- torch.where(seen, updated.sqrt(), self.m)
+ updated.sqrt()
losses/objective.py losses/test_times.py
- if options.is_uniform else None
+ if False else None
losses/weighting.py losses/test_times.py
- uniform=weighting == "likelihood"
+ uniform=False
losses/dsm.py losses/test_times.py
- own["time_sampler"] = self.time_sampler
+
losses/times.py losses/test_times.py
- if module.training]
+ ]
- seed = int(torch.randint(2**62, (), device="cpu"))
+ seed = 0
- torch.randperm(len(x0), device=device, generator=rng)
+ torch.arange(len(x0), device=device)
- "randomness": "different"
+ "randomness": "same"
- outside_inference_mode(), torch.enable_grad():
+ outside_inference_mode():
- state.restore(generators=False)
+
- p.data.copy_(value)
+ pass
- (self.m if m.is_meta else m)
+ self.m
- squares = [plainly(first)]
+ squares, middle = [], [first, *middle]
- middle = middle[-1:]
+ middle = []
- and v.shape == p.shape
+
- roots.get(p, mean.expand(p.shape))
+ roots.get(p, torch.ones_like(p))
losses/objective.py losses/test_times.py losses/test_ramps.py
- first, higher = (None if f is None else f[index] for f in (of_first, of_higher))
+ first, higher = (None if f is None else f[index] for f in (of_first, None))
- mean * len(terms.first)
+ mean * len(products[0])
losses/targets.py losses/test_target_scores.py
- max(count - 1, 1)
+ count
losses/score_check.py losses/test_score_check.py
- .any(1)  # without
+ .all(1)  # without
- len(means) < RUNS
+ False
- math.isnan(mean)
+ False
likelihood/multistep.py test_half_precision.py
- (solver_error + rounded).clamp(
+ solver_error.clamp(
likelihood/paths.py test_half_precision.py
- (self.dtype, *self.watch.answers)
+ (self.dtype,)
- sum_elements(squares * (1 + moved)
+ 100 * sum_elements(squares * (1 + moved)
losses/targets.py test_errors.py
- if tensor.is_floating_point():
+ if False:
schedules/base.py test_errors.py
- if not rate.any() and
+ if False and
"""


def read(text: str) -> list[Mutant]:
    """The mutants of a text, of which a line without a mark names the file and the tests."""
    file, tests, olds, news = "", "", [], []
    for mark, lines in groupby(text.strip().splitlines(), lambda line: line[0]):
        first, *more = lines
        code = "\n".join(line[2:] for line in (first, *more))
        if mark == "-":
            olds.append((file, tests, code))
        elif mark == "+":
            news.append(code)
        elif mark != "#":
            file, *names = first.split()
            tests = " ".join(f"tests/{name}" for name in names)
    pairs = zip(olds, news, strict=True)
    return [Mutant(file, old, new, tests) for (file, tests, old), new in pairs]


MUTANTS = read(FAULTS)


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

"""Faults planted in the source one at a time, each of which the fast tests have to notice.

    python -m tests.mutants [NUMBER ...] [--named-only]

For each mutant a copy of the package has one expression or statement replaced by another. The
named tests run first; the rest of the fast tests run only for mutants which those let through.
`.ci/mutants` writes the outcome to `tests/mutants.txt`.

A fault is found by its function and by syntax, not by line:

    file.py tests that notice what is planted there
    function: old → new

The function is a dotted name (`Class.method`, `function.inner`), or `module` for the whole file.
`old`, written as `ast.unparse` writes it, occurs in it once: an expression, a keyword, a
statement, simple statements with semicolons between them, or the first line of a block (`with
lock:`). Of several, `function#2` takes the second. With `text` for a function, `old` is any part
of a line. A line that is indented goes on with the one above.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hosm_losses"


class Mutant(NamedTuple):
    """A fault: in a function of `file`, `old` becomes `new`; `tests` are tried first."""

    file: str
    tests: str
    function: str
    old: str
    new: str


FAULTS = r"""
taylor/pointwise.py taylor/test_calls.py
_quotient: 2 * tangents * b_tangents → 2 * tangents * tangents
_gelu: density * x * (square - 4) → density * (square - 4)
_mish: torch.addcmul(torch.addcmul(q, q, t, value=2), s, t1, value=2) →
    torch.addcmul(torch.addcmul(q, q, t, value=2), s, t1, value=1)
taylor/pointwise.py taylor/test_edges.py
_softplus: scaled > threshold → x > threshold
taylor/matrices.py taylor/test_matrices.py
_of_log_determinant: products * products.mT → products * products
_det: seconds = seconds + collect(firsts.square(), A.pairs)[:len(seconds)] → pass
_of_log_determinant: inverse.where(info[..., None, None] == 0, torch.nan) →
    inverse.where(info[..., None, None] == 0, 0.0)
_solve: with without_autocast(a.device.type): → if True:
_cholesky.factor: (change + change.mT) / 2 → change
taylor/jets.py taylor/test_directional.py
laplacian: first.movedim(0, -1) → first
jet: stack = stack if torch.is_grad_enabled() else stack.detach() → pass
laplacian: jet(function, x, directions, 'sum') → jet(function, x, directions, 'squares')
differentiate: NO_FORWARD not in str(error) → NO_FORWARD in str(error)
taylor/jets.py taylor/test_constants.py
differentiate.function: refuse_constant(func, floats[0]) → pass
taylor/jets.py taylor/test_complex.py
_Complex.__torch_function__: func not in OF_COMPLEX or len(jets) > 1 → func not in OF_COMPLEX
taylor/jets.py taylor/test_calls.py
along: partial(collect, pairs=pairs) → partial(collect, pairs='squares')
taylor/attention.py taylor/test_attention_masks.py
_attend: mixed if mask is None else ops.mul(mixed, _allows_any(mask)) → mixed
_additive_mask: attn_mask.masked_fill(~rows, 0.0) → attn_mask
taylor/attention.py taylor/test_pullbacks.py
Softmax.pull_back_again: add_products(of_weights, again[:1], total(value), -1) →
    add_products(of_weights, again[:1], total(weights * a), -1)
taylor/attention.py taylor/test_calls.py
_attention: ops.repeat_interleave(tensor, times, -3) → ops.cat([tensor] * times, -3)
taylor/products.py taylor/test_edges.py
_evaluate_form: with without_autocast(others[0].device.type): → if True:
taylor/products.py taylor/test_calls.py
_convolution.biased: with_bias(convolved, bias, x.shape[0]) →
    with_bias(convolved, bias, len(samples))
taylor/norms.py taylor/test_pullbacks.py
_Derivatives.third: _third_along(x.along, y.along, y.along, xy, xy, yy) →
    _third_along(x.along, y.along, y.along, xy, yy, yy)
_Derivatives.of_seconds: along + self.stack(seconds).along → along
taylor/norms.py taylor/test_calls.py
Norm.evaluate: torch.zeros_like → torch.ones_like
_instance_norm: _batch_norm(ops, x, running_mean, running_var, weight, bias, eps=eps) →
    _batch_norm(ops, x, running_mean, running_var, weight, bias)
taylor/norms.py taylor/test_primitives.py
_move_statistics: ops.value(x) → ops.value(x).cos()
taylor/primitives.py taylor/test_primitives.py
_mish: input.copy_(result) if inplace else result → result
taylor/primitives.py taylor/test_constants.py
_SafePrimitives.__torch_function__: refuse_constant(func, result) → pass
taylor/primitives.py taylor/test_primitive_mode.py
recomputable.mode: _SafePrimitives(tables[-1]) if tables else nullcontext() → nullcontext()
taylor/primitives.py losses/test_transforms.py
text: multi_head_attention_forward mish") → mish")
_SafePrimitives.__torch_function__: func == _DATA and is_traced() → False
taylor/linear.py taylor/test_edges.py
_dropout: x.stack * function(torch.ones_like(x.stack[0]), p, True) → function(x.stack, p, True)
taylor/linear.py taylor/test_calls.py
_item: torch.stack([component[index] for component in x.stack.unbind()]) →
    x.stack[slice(None), *parts]
text: any is_nonzero floor ceil round → any is_nonzero floor ceil round frac
taylor/linear.py taylor/test_in_place.py
_item: isinstance(part, list) or getattr(part, 'ndim', 0) → isinstance(part, list | Tensor)
module: linear(_move, _names, view=_table is VIEWS) → linear(_move, _names)
taylor/linear.py taylor/test_jet.py
_register_hook: guarded(cotangent[0]) → guarded(cotangent.sum(0))
taylor/in_place.py taylor/test_in_place.py
_set_item: [0] * (count - len(values)) → values[:1] * (count - len(values))
taylor/memory.py taylor/test_in_place.py
write: jet.memory is not None and len(alive(jet.memory)) > 1 → False
end: versions([value]) != [version] → False
taylor/memory.py taylor/test_recompute.py
_Recomputed.backward: pullbacks[1:] if needed[0] else () → pullbacks[1:]
taylor/composites.py taylor/test_edges.py
_normalize: ops.value(length) * largest → ops.value(length)
_huber_loss: ops.lt(far, delta) → ops.le(far, delta)
taylor/composites.py taylor/test_primitives.py
composite.register: partial(_primitive, function, body) → function
taylor/composites.py taylor/test_calls.py
_cdist: ops.sub(ops.unsqueeze(x1, -2), ops.unsqueeze(x2, -3)) →
    ops.sub(ops.unsqueeze(x1, -3), ops.unsqueeze(x2, -2))
_prod: [count // 2, count // 2, count % 2] → [count // 2, count - count // 2, 0]
derivatives/engines.py derivatives/test_backward.py
reverse.pull: refuse_dropped(vjp_c, wanted) → pass
checked.evaluated: refuse_dropped(value) → pass
derivatives/engines.py losses/test_training_loops.py
pull_each: not in_turn and internals.checkpoint_hook(internals.ANY_CHECKPOINT) is None →
    not torch.compiler.is_compiling()
derivatives/engines.py losses/test_paired.py
products_beside: wanted or push → push
derivatives/engines.py losses/test_frozen.py
may_train: internals.graph_nodes([value], point) → internals.graph_nodes([value])
products_beside: wanted = wanted and may_train(value, x, point) → pass
derivatives/engines.py likelihood/test_graph.py
quadratic_forms: wanted = wanted and may_train(value, x, point) → pass
taylor/registry.py derivatives/test_engines_agree.py
guard_hook.guarded: not same or versions(incoming) != before → not same
derivatives/kinks.py derivatives/test_kinks.py
_between: (set[Any](), [internals.gradient_node(point)]) → (set[Any](above), [])
watch_once.first: (2, 3) if jumping or order == 3 else (2,) → (2, 3)
_Watch.find: [max(n, 1) for n in powers if name == 'relu' or n % 2] → [max(n, 1) for n in powers]
derivatives/select.py taylor/test_primitive_mode.py
_first_to_serve: before.restore() → pass
derivatives/select.py derivatives/test_choice.py
_first_to_serve: (*kind, x.dtype, x.device.type, getattr(owner, 'training', None)) →
    (x.dtype, x.device.type, getattr(owner, 'training', None))
_first_to_serve: not any(here) and (not isinstance(error, RecursionError)) →
    not isinstance(error, RecursionError)
_first_to_serve: before is None or not _another_may_do(engine, error) →
    not _another_may_do(engine, error)
_first_to_serve: None if here in past.served else NetworkState(owner, x) → NetworkState(owner, x)
_first_to_serve: sure or past.failure != '' → True
derivatives/select.py losses/test_dropout.py
_products: order == 3 → False
derivatives/checkpointing.py taylor/test_in_place.py
checkpoint.on_stacks: any((inputs[place].stack is not entries[place] for place in jets)) → False
losses/paired.py losses/test_random_options.py
means_of_halves: estimates[half:] → estimates[1:]
losses/terms.py losses/test_random_options.py
higher_residuals: Dv_plus_v.detach() → Dv_plus_v
squared_terms: model.of_f(derivatives, None, w) → model.of_f(derivatives, batch.x, w)
losses/targets.py losses/test_random_options.py
AveragedTargets.posterior: logits.unflatten(0, (count, -1)).diagonal(0, 1, 2).fill_(-torch.inf) →
    logits.unflatten(0, (count, -1)).diagonal(0, 1, 2).fill_(0.0)
TargetScores._information_for: (squares.sum(0) - squares) / max(count - 1, 1) →
    squares.mean(0).expand_as(squares)
ControlledMoments.along: ell_v * c + c_v * ell → ell_v * c
ControlledMoments.along: c_v.square() - inner(v, Cv) → c_v.square()
ControlledMoments.along: of_ell * ell - ell_v.square() * c + (ell_v + 2 * c_v) * q - ell_v * p →
    of_ell * ell - ell_v.square() * c + 2 * c_v * q
TargetScores.posterior: information = torch.where(information > 0, information, math.inf) → pass
losses/targets.py losses/test_averaged_targets.py
NoiseMoments.slopes: v * (self.scale * self.data - self.mean) → v * self.scale * self.data
NoiseMoments.along: self.sum_of(weighted.mul_(slope)) - inner(v, C2v) * self.mean →
    self.sum_of(weighted.mul_(slope))
AveragedTargets.posterior: data, reference = ((data - origin).repeat(count, 1), reference - origin)
    →
    data = data.repeat(count, 1)
AveragedTargets.posterior: 1 + 1e-12 * (scale * data).square().sum(1) → 1.0
check_conditions: targets.averaged if isinstance(targets, TargetScores) else targets → targets
losses/targets.py losses/test_target_scores.py
cumulants: (v - C2v).reshape(probe.shape).to(probe.dtype) →
    probe - C2v.reshape(probe.shape).to(probe.dtype)
TargetScores._information_for: torch.where(eigenvalues > d * eps * eigenvalues[-1], eigenvalues,
    0.0) →
    eigenvalues
TargetScores._information_for: max(of_scores ** 2, of_F, torch.finfo(torch.float32).eps) →
    max(of_scores ** 2, of_F)
TargetScores._check_information: least < -slack * largest or skew > slack *
    float(information.abs().amax()) →
    skew > slack * float(information.abs().amax())
TargetScores._information_for: max(count - 1, 1) → count
losses/targets.py losses/test_antithetic.py
AveragedTargets.posterior: mask.repeat(count, 1) → mask.repeat_interleave(count, 0)
AveragedTargets.posterior: logits.unflatten(0, (count, -1)).diagonal(0, 1, 2) → logits.diagonal()
losses/targets.py test_errors.py
check_conditions: tensor.is_floating_point() → False
_checks.py losses/test_averaged_targets.py
widest_dtype: torch.float32 if tensor.device.type == 'mps' else torch.float64 → torch.float32
_checks.py test_errors.py
check_range: not bool(((value >= low) & (value <= high)).all()) →
    bool(((value < low) | (value > high)).any())
_checks.py schedules/test_discrete.py
copy_like: torch.compiler.is_compiling() or owns_values(copy) → True
_checks.py model/test_adapters.py
copy_like: with outside_inference_mode(): → if True:
losses/objective.py losses/test_target_scores.py
perturb: moments.mean.reshape(eps.shape) → moments.mean.reshape(eps.shape).to(eps.dtype)
losses/objective.py losses/test_random_options.py
_reduce: of_higher[rows] → of_higher[:len(rows)]
_select_rows: torch.randperm(len(x), device=x.device, **generator_kwargs(generator)) →
    torch.randperm(len(x), device=x.device)
losses/objective.py losses/test_ramps.py
_prepare: needed_order(options.order, checked) → options.order
losses/objective.py losses/test_antithetic.py
_noise: torch.cat([eps, -eps]) → torch.cat([eps, eps])
Perturbed.rows: [rows, len(self.batch.x) // 2 + rows] → [rows, rows]
Perturbed._of_samples: term.reshape(2, -1).mean(0) → term.reshape(-1, 2).mean(1)
Perturbed.terms: torch.cat([v, v], 1) → v.repeat_interleave(2, 1)
Perturbed.first_term: self._of_samples({'first': first_term(residual, self.batch.dimensions)}) →
    {'first': first_term(residual[:, :len(self.batch.x) // 2], self.batch.dimensions)}
dsm: check_result(loss, terms, time) → check_result(loss, terms, batch.t)
_check_tensor_targets: t is None or noise is None → False
losses/objective.py losses/test_times.py
row_losses: options.is_uniform → False
losses/objective.py losses/test_times.py losses/test_ramps.py
row_losses.loss: (of_first, of_higher) → (of_first, None)
_reduce: len(terms['first']) → len(products[0])
losses/score_check.py losses/test_score_check.py
check_scores: abs(mean - wanted) <= 5 * error → abs(mean - wanted) <= 50 * error
_products: min(RUNS, len(x)) → len(x)
_means_of_pairs: 1 / (of_runs.sum(0) - of_runs).square() → torch.ones_like(of_runs)
_means_of_pairs: (r * forces).sum(2) / 2 + x.shape[2] → (r * forces).sum(2) / 2
check_scores: dimension < elements and (not matrix) → False
_extent: torch.linalg.eigvalsh((x.T @ x / len(x)).cpu()) > 1 →
    torch.linalg.eigvalsh((x.T @ x / len(x)).cpu()) > 0
check_scores: varies.reshape(particles, -1).any(1) → varies.reshape(particles, -1).any(1) | True
_extent: len(x) <= count or count > LARGEST → count > LARGEST
check_scores: 5 * error > WRONG * wanted → error > wanted
_products: (total - own.sum(0)) / (len(x) - len(own)) → total / len(x)
check_scores: varies.reshape(particles, -1).any → varies.reshape(particles, -1).all
check_scores: len(means) < RUNS → False
check_scores: math.isnan(mean) → False
losses/weighting.py losses/test_weighting_tables.py
time_factors: schedule.t_max - schedule.t_min + indices → schedule.t_max - schedule.t_min
losses/weighting.py losses/test_times.py
draw_time: uniform=weighting == 'likelihood' → uniform=False
losses/options.py losses/test_ramps.py
needed_order: is_used(weight) → is_used(weight) and term != 'trace'
needed_order: is_used(weight) → is_used(weight) or term == 'third'
model/score_model.py losses/test_transforms.py
ScoreModel.predict: self.primitives → not self.primitives
model/score_model.py schedules/test_discrete.py losses/test_half_precision.py
ScoreModel.time_in: torch.promote_types(like.dtype, torch.float32) → like.dtype
model/score_model.py model/test_score_model.py
_raised_by_the_call: names <= {nn.Module.__module__} → True
module: ('flow_prediction',) → ('flow_prediction', 'v_prediction')
model/score_model.py model/test_posterior.py
ScoreModel.affine_of_data: (-sigma / wronskian, b / wronskian) →
    (-sigma / wronskian, alpha / wronskian)
model/bound.py losses/test_random_options.py
BoundModel.repeat.copies: tensor.repeat(count, *(1,) * (tensor.ndim - 1)) →
    tensor.repeat_interleave(count, 0)
model/bound.py model/test_conditions.py
BoundModel.__call__: map_tensors(self.kwargs, Tensor.clone) →
    per_sample(self.kwargs, lambda _, tensor: tensor.clone())
schedules/discrete.py test_errors.py
DiscreteSchedule.linear: scaled and min(beta_start, beta_end) > 0 → scaled
schedules/discrete.py schedules/test_base.py
DiscreteSchedule._draw: len(self.alphas_cumprod) → len(self.alphas_cumprod) - 1
schedules/base.py losses/test_weighting_tables.py
Schedule._training_time: t.round().long → t.long
schedules/base.py schedules/test_base.py
Schedule.time: 2 * -int(math.log2(torch.finfo(target.dtype).eps)) →
    -int(math.log2(torch.finfo(target.dtype).eps))
schedules/base.py test_errors.py
_check_values: (by_rates > 0) & torch.isclose(diffusion, by_rates, rtol=TOLERANCE) → diffusion > 0
_check_values: not rate.any() → False
schedules/continuous.py schedules/test_base.py
_one_minus_exp: -torch.expm1(-b) → 1 - torch.exp(-b)
_one_minus_exp: 2 * torch.exp(-b / 2) * torch.sinh(b / 2) → 1 - torch.exp(-b)
_asinh: torch.log1p(h + h.square() / (1 + torch.sqrt(1 + h.square()))) →
    torch.log(h + torch.sqrt(1 + h.square()))
_asinh: h = h.clamp(max=1e+18) → pass
probes.py test_probes.py
_sphere: _gaussian(shape, like, generator).reshape(*shape[:2], -1) →
    _gaussian(shape, like, generator).reshape(shape[0], -1)
_from_cosines: torch.where(index == 0, 2.0, 1.0) → torch.where(index == 0, 1.0, 1.0)
probes.py likelihood/test_paths.py
Hutchinson.estimate: probes.square() → probes.abs()
taylor/_torch.py losses/test_random_options.py
_left: with torch.inference_mode(False), torch.no_grad(): → with torch.inference_mode(False):
likelihood/multistep.py likelihood/test_multistep.py
Quadrature.error: difference / 15 → difference / 7
AdamsSolver.correct: index == 4 → index == -1
weighted_sum: weight - 1 → weight
PathError.replace_first: self.effects.pop() → self.effects[-1]
PathError.add: torch.maximum(self.share, least_share) → self.share
AdamsSolver.correct: self._move_slope(self.secant * self.correction) → pass
AdamsSolver._weight_of_order_five: self._turned(4) → ~self._turned(3)
AdamsSolver._weight_of_order_five: ratio.square() → 0 * ratio
solve_on_grid: steps < ORDER_FIVE → False
solve_on_grid: sorted((*span, coordinates.log_size))[1] → coordinates.log_size
velocity_mesh_points: 1 + torch.sqrt(1 - t) → 2
solve_on_grid: is_flow and coordinates.model.prediction == 'velocity' →
    coordinates.model.prediction == 'velocity'
velocity_mesh_points: centre + torch.log(square * (2 - square)) → torch.log(square * (2 - square))
Quadrature.error: q.diff(n=7, dim=0).norm(dim=0) →
    q.diff(n=7, dim=0).norm(dim=0).amax()
solve_on_grid: (solver_error + rounded).clamp(min=rounding(paths.dtype)) → solver_error + rounded
likelihood/multistep.py likelihood/test_start.py
solve_on_grid: index == runge_kutta + 1 → index == 1 and (not runge_kutta)
solve_on_grid: 3 * runge_kutta * (1 + companion) → 3 * runge_kutta
likelihood/multistep.py likelihood/test_half_precision.py
solve_on_grid: solver_error + rounded → solver_error
likelihood/multistep.py likelihood/test_compiled.py
take_steps: rule.order + 2 → rule.order
AdamsSolver.first_group: max(self.rule.order + 1, self.rule.runge_kutta) → self.rule.runge_kutta
likelihood/compiled.py likelihood/test_compiled.py
Programs.of: _PROGRAMS.setdefault(network, cls()) → cls()
Programs.run: self.refused = True → pass
_compiled: code.replace(co_name=f'{code.co_name}_{next(_NUMBERS)}') → code
likelihood/solvers.py likelihood/test_compiled.py
FixedGrid.integrate: len(z) == paths.size → True
likelihood/solvers.py likelihood/test_tolerance.py
ToTolerance.solve: torch.cat(places).argsort() → torch.cat(places)
ToTolerance.solve: error > self.tolerance → (error > self.tolerance).any().expand_as(rows)
likelihood/solvers.py likelihood/test_random_settings.py
Solver.solve: (paths.x, -integral) if backwards else (x, integral) →
    (paths.x if backwards else x, integral)
likelihood/ode.py likelihood/test_ode.py
_prior_error: coordinates.log_gaussian(latent, end) - paths.log_prior_at(latent) →
    paths.log_prior_at(latent) - coordinates.log_gaussian(latent, end)
likelihood/solvers.py likelihood/test_sample.py
FixedGrid.compare: torch.maximum(difference.abs(), back.solver_error) → back.solver_error
FixedGrid.compare: error.masked_fill(back.failed, math.inf) → error.nan_to_num(0.0)
likelihood/ode.py likelihood/test_interrupt.py
_samples: latent[:len(result.latent)] → latent
likelihood/solvers.py likelihood/test_failures.py
Solver.solve: [(Cause.OUTPUT, ~all_finite(x)), (Cause.DIVERGENCE, ~integral.isfinite()),
    (Cause.RANGE, ~all_finite(at_end))] →
    [(Cause.OUTPUT, ~all_finite(x)), (Cause.RANGE, ~all_finite(at_end))]
Solver.solve: cause.masked_fill(~starts, Cause.START) → cause
Solver.solve: [(Cause.OUTPUT, ~all_finite(x)), (Cause.DIVERGENCE, ~integral.isfinite()),
    (Cause.RANGE, ~all_finite(at_end))] →
    [(Cause.OUTPUT, ~all_finite(x)), (Cause.DIVERGENCE, ~integral.isfinite())]
likelihood/paths.py likelihood/test_said.py
FirstEvaluation.compare: not all(map(torch.equal, before, after)) → False
FirstEvaluation.compare: self.due.discard('draws') → pass
likelihood/paths.py likelihood/test_graph.py
Paths._evaluate: nonfinite | ~all_finite(model.f(points)) → ~all_finite(model.f(points))
Paths._evaluate: nonfinite | ~finite → ~finite
likelihood/paths.py likelihood/test_half_precision.py
Paths.rounding_error: (self.dtype, *self.watch.answers) → (self.dtype,)
Paths.rounding_error: sum_elements(squares * (1 + moved) + torch.zeros_like(z), 1) →
    100 * sum_elements(squares * (1 + moved) + torch.zeros_like(z), 1)
likelihood/job.py likelihood/test_random_settings.py
Job._batches: self.options.generator → None
likelihood/job.py test_errors.py
_refuse_learnt: any((part.requires_grad for part in parts)) → parts[0].requires_grad
likelihood/job.py likelihood/test_interrupt.py
Job._joined: results[:len(results) // batches * batches] or results → list(results)
likelihood/result.py likelihood/test_failures.py
mark_failed: failed & holds & (cause == 0) → failed & holds
likelihood/solvers.py likelihood/test_own_solver.py
Solver.solve: torch.full_like(result.solver_error, math.nan) → result.solver_error
Solver.solve: nfe * paths.divergence.products → nfe
likelihood/dequantize.py likelihood/test_ode.py
importance_weighted: corrected.logsumexp(0) - log_density.detach().logsumexp(0) →
    stacked('prior_error').mean(0)
likelihood/dequantize.py likelihood/test_said.py
warn_of_levels: levels.min() >= 0 and levels.max() < LEVELS and ((k - levels).abs().max() < 0.001)
    →
    levels.min() >= 0 and levels.max() < LEVELS
warn_of_levels: len(levels.unique()) > 16 → len(levels.unique()) > 2
warn_of_levels: 127.5 * (first + 1) → 127.5 * first
likelihood/dequantize.py likelihood/test_bounds.py
TruncatedNormal.draw: math.log(2 * HALF_CELL / math.sqrt(2 * math.pi) / mass) - start.alpha.log() →
    math.log(2 * HALF_CELL / math.sqrt(2 * math.pi) / mass) + start.alpha.log()
likelihood/adaptive.py likelihood/test_adaptive.py
_solve.slope: probes[:, rows] → probes[:, :len(rows)]
solve_adaptive: _solve(paths, z, span, probes, tolerance / FINER, coarse.cause > 0) →
    _solve(paths, z, span, probes, tolerance / FINER)
least_tolerance: torch.promote_types(dtype, torch.float32) → dtype
_solve.slope: rounding > solver_limit(paths.dimensions) → rounding < 0
likelihood/adaptive.py likelihood/test_failures.py
adaptive: torch.where(reason == 0, why, reason) → why
_solve.slope: cause.masked_fill(~all_finite(noise), Cause.OUTPUT) → cause
adaptive: reason.masked_fill(reason == 0, Cause.ARRIVAL) → reason
likelihood/result.py likelihood/test_result.py
Result.summary: float(nll.detach()[good].double().std()) / count ** 0.5 →
    float(nll.detach()[good].double().std()) / len(good) ** 0.5
Result.__getitem__: isinstance(value, Tensor) → name == 'nll'
NLLSummary.__str__: self.prior_size >= SHOWN → self.prior_size < SHOWN
likelihood/result.py likelihood/test_variational.py
text: source = "draws" if self.products is None else "probes" → source = "probes"
likelihood/variational.py likelihood/test_variational.py
_bound: draws.var(0) / at_start → draws.var(0) / samples
diagnostics/wrapping.py diagnostics/test_wrapping.py
_Search._call: self.levels + change → self.levels
_Search._draw: GOLDEN * sample % 1 → 0 * sample
_Search._draw: (1 / self.place.flatten().bincount().double())[self.place] →
    torch.ones_like(quantile)
_Search._shares: shares + shares.sum().clamp(min=1) / len(shares) → torch.ones_like(shares)
_Search._call: schedule.log_sigma_hat(t) → level
check_wrapping#2: before.restore() → before.restore(generators=False)
check_wrapping#1: before.restore() → pass
check_wrapping: (multiples % 1).argsort → multiples.argsort
_affordable: min(seconds, time.perf_counter() - start) → time.perf_counter()
_Search._is_better: max(FINE_ERRORS * error, FINE_MARGIN) → FINE_ERRORS * error
_Search.report: sum(is_worse) < WORSE * len(is_worse) and (not self._is_clear(own, self.linear)) →
    sum(is_worse) < WORSE * len(is_worse)
_Search._is_trained: self._excess(losses, self.linear)[0] > CLOSE → False
_Search._is_trained: BELIEVED.get(read.kind, 1) → 1
_Search._is_trained: any((self._is_better(losses, self.linear, place) for place in places)) → True
_Search._detectable_gain: min(error, (FINE_ERRORS + ERRORS) * error ** 2 / -gain) → error
_Search._detectable_gain: excess + FINE_ERRORS * error → 0.0
diagnostics/differences.py diagnostics/test_check.py
Agreement._disagreement: not error <= TOLERANCE[self.precision] → error > TOLERANCE[self.precision]
Smoothness.find: all((bool(torch.isfinite(part).all()) for part in parts)) → True
diagnostics/values.py diagnostics/test_check.py
check_rows: (places.roll(1), places[:1].expand_as(places), places[-1:].expand_as(places)) →
    (places.roll(1),)
diagnostics/check.py diagnostics/test_check.py
check_derivatives: fork_rng(device) → torch.enable_grad()
interop.py interop/test_stand_ins.py
table_schedule: torch.as_tensor(owner.alphas_cumprod, dtype=torch.float64, device='cpu').detach →
    torch.as_tensor(owner.alphas_cumprod, device='cpu').detach().double
_by_name_like_x: timestep=t.to(x.dtype) → timestep=t
_refuse_discrete: continuous and configured → continuous
interop.py interop/test_references.py
from_guided_diffusion: getattr(diffusion, 'original_num_steps', steps) → steps
interop.py test_errors.py
_refuse_jumps: stages > 1 → stages > 3
_refuse_jumps: any((part in name for part in JUMPS)) → name in JUMPS
interop.py interop/test_one_expression.py
_time_from_noise: factor * (1 - t) → 1 - factor * t
from_flow_matching: torch.neg if data_at == 1 else None → torch.neg
model/posterior.py model/test_posterior.py
PosteriorCovariance.product: (products + jacobian_v) / 2 → products
PosteriorCovariance.dense: (matrices + matrices.mT) / 2 → matrices
PosteriorCovariance.diagonal: self.product(v, symmetric=False) → self.product(v)
likelihood/distribution.py likelihood/test_distribution.py
ODEDistribution._repeated.repeated: tensor.expand(outer + tensor.shape[len(batch):]) →
    tensor.repeat_interleave(outer.numel() // max(batch.numel(), 1), 0).reshape(outer +
    tensor.shape[len(batch):])
ODEDistribution._options: t.to(dtype) if t.is_floating_point() else t → t
ODEDistribution._noting_conditions: shape and (not self.batch_shape) → not self.batch_shape
likelihood/solvers.py test_errors.py
plain_moment: (numbers > least) & (numbers < math.inf) → numbers > least
likelihood/weights.py likelihood/test_weights.py
_log_target: ~failed & ~(values < math.inf) → ~(values < math.inf)
Weights.__str__: bool(self.log_weights.isneginf().all()) → False
Sandwich.__str__: f' ± {e:.4f}' * math.isfinite(e) → f' ± {e:.4f}'
importance_weights: result.failed.double → log_weights.isneginf().double
importance_weights: variance = torch.where(result.failed, 0.0, variance) → pass
importance_weights: torch.where(result.failed, 0.0, result._errors().detach()) →
    result._errors().detach()
Weights.__str__: self.effective_sample_size < count / 4 → self.effective_sample_size < count / 2
Weights.log_z_interval: torch.cat([self.normalized, self.normalized.max()[None]]) → self.normalized
Weights.log_z_interval: math.cbrt(1 - gamma * u) → 1.0
model/adapters.py model/test_adapters.py
_basis: eigenvalues > 0.5 → eigenvalues > 1.5
_basis: weights[:, None] * P → P
_basis: Q = Q * torch.where(h @ Q < 0, -1.0, 1.0) → pass
_basis: projected(v) - v @ Q @ Q.mT → P - Q @ Q.mT
OnSubspace.reduce: off > max(OFF, 4 * torch.finfo(x.dtype).eps) * exact.abs().amax() →
    off < 0 * max(OFF, 4 * torch.finfo(x.dtype).eps) * exact.abs().amax()
OnSubspace._times_basis: with full: → if full:
OnSubspace.__getstate__: {**state, '_copies': {}} → state
_basis: (0.1 + h).cumsum(0) → n
_basis: torch.where(h @ Q < 0, -1.0, 1.0) → torch.where(n @ Q < 0, -1.0, 1.0)
OnSubspace.set_extra_state: ROUNDING → 2
OnSubspace.set_extra_state: self._basis, self._copies = (Q, {}) → self._basis = Q
model/adapters.py model/test_score_model.py
Wrapper._innermost: self.network._innermost if isinstance(self.network, Wrapper) else self.network
    →
    self.network
losses/times.py losses/test_times.py
AdaptiveTimes._ratios: (masses * m).sum → m.mean
Bins.place: torch.searchsorted(above / total, unit, right=True) → (unit * BINS).long()
Bins.place: (above[bins] - total * unit) / weights[bins] →
    (above[bins] - total * unit) / weights.max()
Bins.place: torch.minimum(torch.maximum(index - 1, start), stop - 1) → start
AdaptiveTimes.learn: with fork_rng(device), outside_inference_mode(), torch.enable_grad(): →
    with outside_inference_mode(), torch.enable_grad():
AdaptiveTimes.learn: unit[order[:count]] = (torch.arange(count, device=device) + unit[:count]) /
    count →
    pass
AdaptiveTimes.learn: torch.where(bins.masses > 0, 1 / bins.masses, 0.0) →
    torch.ones_like(bins.masses)
AdaptiveTimes.learn: module.training = False → module.training = True
_squared_gradients.square: squares @ factor.flatten() → squares.sum()
_trained: v.to(p.device, torch.float32).sqrt() + small → v.to(p.device, torch.float32).sqrt()
AdaptiveTimes._update: means[seen].mean → means.mean
AdaptiveTimes._update: torch.where(seen, updated.sqrt(), self.m) → updated.sqrt()
AdaptiveTimes.learn: [module for module in counting if module.training] →
    [module for module in counting]
AdaptiveTimes.learn: int(torch.randint(2 ** 62, (), device='cpu')) → 0
AdaptiveTimes.learn: torch.randperm(len(x0), device=device, generator=rng) →
    torch.arange(len(x0), device=device)
_squared_gradients: 'different' → 'same'
AdaptiveTimes.learn: with fork_rng(device), outside_inference_mode(), torch.enable_grad(): →
    with fork_rng(device), outside_inference_mode():
AdaptiveTimes.learn: state.restore(generators=False) → pass
AdaptiveTimes.learn: p.data.copy_(value) → pass
AdaptiveTimes._apply: self.m if m.is_meta else m → self.m
_squared_gradients: squares = [plainly(first)] → squares, middle = ([], [first, *middle])
_squared_gradients: middle[-1:] → []
_trained: isinstance(v, Tensor) and v.shape == p.shape and v.is_floating_point() →
    isinstance(v, Tensor) and v.is_floating_point()
_trained: mean.expand(p.shape) → torch.ones_like(p)
losses/dsm.py losses/test_times.py
_DSM._evaluate: own['time_sampler'] = self.time_sampler → pass
"""


def read(text: str) -> list[Mutant]:
    """The mutants of a text."""
    mutants, file, tests = [], "", ""
    for line in re.sub(r"\n +", " ", text.strip()).splitlines():
        if " → " in line:
            function, change = line.split(": ", 1)
            mutants.append(Mutant(file, tests, function, *change.split(" → ")))
        else:
            file, *names = line.split()
            tests = " ".join(f"tests/{name}" for name in names)
    return mutants


MUTANTS = read(FAULTS)


def scopes(source: str, function: str) -> list[ast.AST]:
    """The functions or classes of a dotted name, which overloads and properties share."""
    found: list[ast.AST] = [ast.parse(source)]
    for name in function.split(".") if function != "module" else []:
        inner = [node for scope in found for node in ast.walk(scope) if node is not scope]
        named = [node for node in inner if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        found = [node for node in named if node.name == name]
    return found


def find(scope: ast.AST, old: str) -> Iterator[tuple[Any, Any]]:
    """The first and the last node that `old` spells; for a block's first line, it and None."""
    length = old.count("; ") + 1
    for node in ast.walk(scope):
        if isinstance(node, ast.expr | ast.keyword) and ast.unparse(node) == old:
            yield node, node
        bodies = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
        for body in (body for body in bodies if isinstance(body, list)):
            for place, first in enumerate(body):
                run = body[place : place + length]
                if isinstance(first, ast.stmt) and "; ".join(map(ast.unparse, run)) == old:
                    yield first, run[-1]
                elif old[-1] == ":" and ast.unparse(first).splitlines()[0] == old:
                    yield first, None


def plant(mutant: Mutant, source: str) -> str:
    """The source with the fault."""
    name, _, number = mutant.function.partition("#")
    if name == "text" and source.count(mutant.old) == 1:
        return source.replace(mutant.old, mutant.new)
    text = source.encode()  # in which ast counts columns
    lines = [0, *accumulate(len(line) for line in text.splitlines(keepends=True))]
    found: dict[int, tuple[int, str]] = {}
    for first, last in chain.from_iterable(find(s, mutant.old) for s in scopes(source, name)):
        start = lines[first.lineno - 1] + first.col_offset
        if last is None:
            end = lines[first.body[0].lineno - 1] - 1
        else:
            end = lines[last.end_lineno - 1] + last.end_col_offset
        new = f"({mutant.new})" if isinstance(first, ast.expr) else mutant.new
        found.setdefault(start, (end, new))  # of a statement that is an expression, the statement
    if not number and len(found) != 1:
        raise ValueError(f"{mutant.file}, {name}: expected {mutant.old!r} once; got {len(found)}.")
    start, (end, new) = sorted(found.items())[int(number or 1) - 1]
    return (text[:start] + new.encode() + text[end:]).decode()


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
        copy = Path(scratch) / "hosm_losses"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
        (copy / mutant.file).write_text(plant(mutant, source), encoding="utf-8")
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

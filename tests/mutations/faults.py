"""Forty faults that somebody could have written, and the folders of tests that should see them."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault.

    Attributes:
        room: Part of the repository, five faults each.
        file: Where it is planted.
        original: Text that occurs once in the file.
        replacement: What takes its place.
        tests: Files and folders of ``tests`` that are about the file or use it.
    """

    room: str
    file: str
    original: str
    replacement: str
    tests: str


FAULTS = (
    Fault(
        "core_gates",
        "core_gates/routing/losses.py",
        "for total in (total_chosen, num_positions):",
        "for total in (total_chosen,):",
        "core_gates/routing distributed/test_balancing_ranks.py",
    ),
    Fault(
        "core_gates",
        "core_gates/routing/capacity.py",
        "stable_sort(priority.detach(), descending=True)",
        "stable_sort(priority.detach())",
        "core_gates/routing",
    ),
    Fault(
        "core_gates",
        "core_gates/gates/sigmoid.py",
        "(load.sum() - self.num_experts * load).sign()",
        "(self.num_experts * load - load.sum()).sign()",
        "core_gates/gates/test_sigmoid.py core_gates/gates/test_gate_contract.py",
    ),
    Fault(
        "core_gates",
        "core_gates/attention/output_gate.py",
        "torch.arange(num_before, num_before + x.shape[1], device=x.device)",
        "torch.arange(x.shape[1], device=x.device)",
        "core_gates/attention/test_kv_cache.py core_gates/attention/test_output_gate.py",
    ),
    Fault(
        "core_gates",
        "core_gates/adapters/gated_lora.py",
        "plain = base if bias is None else base - bias",
        "plain = base",
        "core_gates/adapters",
    ),
    Fault(
        "harness",
        "harness/evidence/bootstrap.py",
        "if units == 1 or finite.size == 0:",
        "if finite.size == 0:",
        "harness/evidence",
    ),
    Fault(
        "harness",
        "harness/evidence/bootstrap.py",
        "generator.integers(length - block + 1,",
        "generator.integers(length - block,",
        "harness/evidence",
    ),
    Fault(
        "harness",
        "harness/experiment/tuning.py",
        "_sobol(len(space), count, seed + 1)",
        "_sobol(len(space), count, seed)",
        "harness/experiment",
    ),
    Fault(
        "harness",
        "harness/files/piece.py",
        "if not path.is_file() or sha256(path) != digest:",
        "if not path.is_file():",
        "harness/experiment harness/files harness/runs/test_kill_and_resume.py",
    ),
    Fault(
        "harness",
        "harness/files/piece.py",
        "names = [n for n in {**wanted, **found} if",
        "names = [n for n in wanted if",
        "harness/experiment harness/files",
    ),
    Fault(
        "weather",
        "weather/baselines/letkf.py",
        "(num_members - 1) / inflation",
        "(num_members - 1) * inflation",
        "weather/baselines",
    ),
    Fault(
        "weather",
        "weather/observations/operators.py",
        "torch.where(across & wind[:, None], -1.0, 1.0)",
        "torch.where(across & wind[:, None], 1.0, 1.0)",
        "weather/observations",
    ),
    Fault(
        "weather",
        "weather/cycle.py",
        "fits = previous is not None and forecast.step_hours == hours",
        "fits = previous is not None",
        "weather/models/fengwu weather/experiments/test_experiment.py weather/test_cycle.py",
    ),
    Fault(
        "weather",
        "weather/metrics.py",
        "assimilator.analyze(step.background, observations.withhold(~self.points))",
        "assimilator.analyze(step.background, observations)",
        "weather/experiments",
    ),
    Fault(
        "weather",
        "weather/models/leapfrog.py",
        "ends.add_(current, alpha=1 - 2 * self.time_filter)",
        "ends.add_(current, alpha=1 - self.time_filter)",
        "weather/models/held_suarez weather/models/shallow_water",
    ),
    Fault(
        "endoscopy",
        "endoscopy/training/losses.py",
        "torch.where(censored & (error > 0), 0, error)",
        "torch.where(censored & (error < 0), 0, error)",
        "endoscopy/training",
    ),
    Fault(
        "endoscopy",
        "endoscopy/evaluation/conformal.py",
        "np.ceil((len(self.residuals) + 1) * self.coverage - 1e-9)",
        "np.ceil(len(self.residuals) * self.coverage - 1e-9)",
        "endoscopy/evaluation",
    ),
    Fault(
        "endoscopy",
        "endoscopy/evaluation/conformal.py",
        'for column in ("censored", "abstained"):',
        'for column in ("censored",):',
        "endoscopy/evaluation endoscopy/bundles",
    ),
    Fault(
        "endoscopy",
        "endoscopy/evaluation/conformal.py",
        "widest = max(widest, few.half_width)",
        "widest = few.half_width",
        "endoscopy/evaluation endoscopy/bundles",
    ),
    Fault(
        "endoscopy",
        "endoscopy/training/targets.py",
        "0.5 * (knots[:, 1:] + knots[:, :-1]) * steps",
        "knots[:, 1:] * steps",
        "endoscopy/training",
    ),
    Fault(
        "recsys and video",
        "recsys/metrics/probabilities.py",
        "wins = positive_weight @ (tied.cumsum() - tied / 2)",
        "wins = positive_weight @ (tied.cumsum() - tied)",
        "recsys/metrics",
    ),
    Fault(
        "recsys and video",
        "recsys/embedding/row_wise_adagrad.py",
        "torch.where(touched, table[rows].to(grad.dtype), 0)",
        "table[rows].to(grad.dtype)",
        "recsys/test_embedding.py",
    ),
    Fault(
        "recsys and video",
        "recsys/columns/column_auc.py",
        "(_auc(_means(*other), *half_counts) + _auc(_means(*half_counts), *other)) / 2",
        "(_auc(_means(*half_counts), *half_counts) + _auc(_means(*other), *other)) / 2",
        "recsys/test_columns.py recsys/data",
    ),
    Fault(
        "recsys and video",
        "video_multitask/history.py",
        "kept = end - np.arange(len(ordered)) <= self.length",
        "kept = end - np.arange(len(ordered)) < self.length",
        "video_multitask/test_history.py",
    ),
    Fault(
        "recsys and video",
        "video_multitask/history.py",
        "within = np.where(tie > start[part_places], sums[tie - 1], 0.0)",
        "within = sums[part_places]",
        "video_multitask/test_history.py video_multitask/test_leaks.py",
    ),
    Fault(
        "diffusion",
        "diffusion/models/flow_matching.py",
        "t.view(-1, 1, 1, 1)), t, noise - latents)",
        "t.view(-1, 1, 1, 1)), t, latents - noise)",
        "diffusion/models",
    ),
    Fault(
        "diffusion",
        "diffusion/rivals/merged.py",
        "given = list(stack * drawn / density)",
        "given = list(stack * drawn)",
        "diffusion/rivals",
    ),
    Fault(
        "diffusion",
        "diffusion/rivals/merged.py",
        "math.copysign(root, value) for root, value in",
        "root for root, _ in",
        "diffusion/rivals",
    ),
    Fault(
        "diffusion",
        "diffusion/lora_file/scales.py",
        "(math.sqrt(stated) if self.stabilized else stated)",
        "stated",
        "diffusion/lora_file",
    ),
    Fault(
        "diffusion",
        "diffusion/rivals/k_lora.py",
        "self._step * each + self._calls",
        "self._step + self._calls",
        "diffusion/rivals",
    ),
    Fault(
        "language",
        "language/generation.py",
        "before = F.pad(probabilities.cumsum(-1)[..., :-1], (1, 0), value=-1)",
        "before = probabilities.cumsum(-1)",
        "language/test_generation.py",
    ),
    Fault(
        "language",
        "language/generation.py",
        "np.random.default_rng([seed, *prompt])",
        "np.random.default_rng([seed, number])",
        "language/test_generation.py",
    ),
    Fault(
        "language",
        "language/scoring.py",
        "tokens[start : start + context + 1]",
        "tokens[start : start + context]",
        "language/test_scoring.py",
    ),
    Fault(
        "language",
        "language/offload/caches.py",
        "rank=lambda c, e: (c.count[e], c.last[e])",
        "rank=lambda c, e: (c.count[e], -c.last[e])",
        "language/offload",
    ),
    Fault(
        "language",
        "language/seer/distillation.py",
        "skip = SKIPPED if isinstance(gate, AttnGate) else 0.0",
        "skip = 0.0",
        "language/seer",
    ),
    Fault(
        "apps",
        "apps/study/gaussian_rates.py",
        "float(np.abs(line).max())",
        "float(line.max())",
        "apps/study",
    ),
    Fault(
        "apps",
        "apps/video/score.py",
        "error.row + begun",
        "error.row",
        "apps/video/test_score.py",
    ),
    Fault(
        "apps",
        "apps/video/comparison.py",
        "(piece.seed or 0) + number",
        "piece.seed or 0",
        "apps/video/test_comparison.py apps/video/test_options.py",
    ),
    Fault(
        "apps",
        "apps/endoscopy/size_scoring.py",
        "seeds = [s for s in wanted.seeds if (evaluation.main, s) not in lacking]",
        "seeds = list(wanted.seeds)",
        "apps/endoscopy e2e/test_endoscopy.py",
    ),
    Fault(
        "apps",
        "apps/diffusion/merge.py",
        "abs(strengths[n]) * shares.get(block, 0)",
        "shares.get(block, 0)",
        "apps/diffusion/test_merge.py apps/diffusion/test_strengths.py",
    ),
)

"""The policy-gradient family: sample groups, weigh decisions by advantage, bound the step.

A step from top to bottom: :meth:`PolicyGradient.collect` chooses prompts, rolls out, scores, lets hooks change the
batch and shares the scores out over decisions (``credit``); :meth:`PolicyGradient.updates` cuts that into optimiser
steps and micro-batches; ``policy_loss`` adds up objective, KL, entropy and value terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed, losses
from mmrl.advantages import group_sums
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks, score, score_greedy, split_groups
from mmrl.algorithms.credit import GROUP_BASELINES, PER_COLUMN, PER_DECISION, Credit, CreditMethod
from mmrl.algorithms.denoising_credit import Completion, NoiseCalibration, Prospects, noise_weights
from mmrl.algorithms.experience import Batch, Experience, ReferenceScores, reference_logp, replay
from mmrl.algorithms.hooks.consistency import Consistency
from mmrl.algorithms.hooks.dynamic_sampling import DynamicSampling
from mmrl.algorithms.hooks.hints import Hints
from mmrl.algorithms.hooks.injection import GroundTruth
from mmrl.algorithms.hooks.prompt_choice import PromptChoice, PromptRecord
from mmrl.algorithms.hooks.replay import Replay, ReplayBuffer
from mmrl.algorithms.hooks.rethinking import Rethinking
from mmrl.algorithms.objectives import Objective, ObjectiveName, default_clip_range
from mmrl.algorithms.policy_loss import KLName, MicroBatch, PolicyLoss
from mmrl.algorithms.regularisers import EntropyBonus, EntropyTarget, Importance, ValueHead, top_entropy_mask
from mmrl.algorithms.turns import ClipSchedule, discount_factor, turns_of
from mmrl.errors import UserError
from mmrl.policy import VERB_HELP
from mmrl.types import Prompt, Rollout


class PolicyGradient:
    """GRPO and its relatives on the decisions of any policy.

    Args:
        group_size: samples per prompt.
        objective: ``clip`` PPO/GRPO; ``gspo`` the same on the mean log-ratio of a sample; ``gspo_token`` with its value
            and each decision's own gradient; ``cispo``; ``sapo`` a soft clip; ``gmpo`` the geometric mean of clipped
            ratios; ``reinforce``; ``regression`` Reg-GRPO; ``guard`` GRPO-Guard and ``dppo`` Flow-DPPO for Gaussian
            decisions. See ``mmrl.losses``.
        clip_range: lower clip bound. When not given: 1e-4 for Gaussian decisions, whose log-probs are means over
            elements, and 0.2 for tokens (gspo 3e-4, gmpo 0.4 on the log-ratio).
        clip_range_high: upper bound; the same when only the other is given (gspo on tokens: 4e-4).
        dual_clip: bound on the loss of negative advantages, as a multiple (> 1).
        clip_schedule: tighter clip bounds for the first decisions of a turn (DPPO); a picture is one turn.
        decision_discount: the policy term of a decision is multiplied by this for every decision of its turn that is
            still to come (DPPO's denoising discount).
        step_weight: ``noise`` multiplies the policy term of a denoising step by its noise over the mean noise of all
            steps (TempFlow-GRPO).
        ratio_bounds: clamp of CISPO's weight, on the ratio itself.
        sapo_temperatures: of positive and of other advantages.
        regression_scale: of the log-ratio in Reg-GRPO.
        divergence_threshold: of ``dppo``.
        aggregation: ``sequence`` mean over a sample's decisions, then over samples; ``token`` mean over all decisions;
            ``constant`` sum over samples times ``max_decisions``; ``blocks`` mean over the decisions of ``block_rows``
            samples, then over these blocks (BNPO, whose published form has the micro-batch for a block).
        block_rows: samples of a block; ``group_size`` when not given.
        max_decisions: divisor of ``constant``; the policy's length limit when not given.
        mask_truncated: samples that hit the limit of length or turns teach nothing; ``exclude`` also leaves them out of
            the number of samples that the loss is divided by (over-turn masking, Mini-o3, arXiv 2509.07969).
        advantage: see ``mmrl.advantages``; ``gdpo`` normalises each reward within its group, then the sum over the
            batch; ``decoupled`` leaves out the second, as MixGRPO does; ``remax`` R minus the reward of the greedy
            output; ``returns`` the discounted reward to come, per decision; ``gae`` with a value head; ``gain`` by how
            much a denoising step, and by ``gamma`` those after it, raised the score of what the sampler makes of its
            state without noise (DenseGRPO); ``tree`` the mean score of all samples that share a decision (BranchGRPO).
            The last two compare each decision with the same one of the others of its group.
        completion: of ``gain``: the rest of the deterministic sampler (``ode``), or one ``jump`` to its estimate of the
            clean output, which is cheaper and worse.
        calibrate_noise: of ``gain``: adapt the noise of each step.
        process_coef: weight of further advantages, those of the rewards of states by which ``pipeline.steering`` steers
            (Euphonium's dual reward); each compares a decision with the same one of the others of its group.
        extremes: learn from so many of the best and so many of the worst of each group alone (DanceGRPO's best-of-N,
            B2-DiffuRL's comparison of branches).
        advantage_clip: bound on the size of an advantage; null for none.
        soft_advantage: bend of advantages above and below 0 (TempSamp-R1); 0 is straight.
        advantage_scale: factor of advantages above and below 0; less than 1 for the first one asks for exploration
            (A-GRAE, arXiv 2602.05548).
        whiten: subtract the mean and divide by the spread of advantages over all decisions of all processes.
        gamma, lam: discount, and decay of GAE.
        value: options of the value loss, used by ``gae``.
        kl_coef: weight of the KL to the reference; 0 runs no reference, and the metric ``kl`` is then the k3 estimate
            of how far the policy has moved from the one that sampled.
        kl: ``exact`` for Gaussian decisions, mean over elements; ``exact_dt`` the same times the step size, which is
            what Flow-GRPO's released code adds; ``k1``, ``k2``, ``k3`` estimates for any decisions. When not given:
            exact for Gaussian decisions, k3 for tokens.
        kl_gradient: of the estimates: their own (``value``) or k2's, which is right on-policy.
        kl_ratio_weight: multiply the KL of each decision by its ratio, which makes k3's gradient right.
        kl_in: ``loss``, or ``reward``: ``kl_coef * (log pi_old - log pi_ref)`` is taken from the reward of each
            decision, or their sum from that of the sample.
        entropy_coef: weight of the bonus for the mean entropy of decisions.
        entropy_target: adapt that weight; ``entropy_coef`` is its start.
        top_entropy: share of decisions, those of the highest entropy at rollout, that the policy term learns from.
        importance: correct for members that another policy sampled.
        dynamic_sampling: replace groups whose scores are all equal by those of further prompts (DAPO).
        rethinking: let some answers go on after a trigger (VL-Rethinker).
        ground_truth: put the given answer into groups (ViSurf, TempSamp-R1).
        hints: roll groups that all failed out again with a hint (Guide).
        consistency: bonus for answers that a slow reference finds likely after their reasoning (GRPO-CARE).
        prompt_choice: draw prompts by variance or difficulty (MMR1, curricula).
        replay: keep samples that taught something for steps that have too few (VL-Rethinker).
        drop_silent: compute nothing for samples with advantage 0, not even their KL. When not given: always for
            Gaussian decisions, as Flow-GRPO does, and for tokens where no KL, entropy or value term acts on them.
        epochs: passes over a rollout.
        minibatches: optimiser steps per pass; whole groups stay together.
    """

    needs_gradient_of_reward = False
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=1)] = 8,
        objective: ObjectiveName = "clip",
        clip_range: Annotated[float, Field(gt=0)] | None = None,
        clip_range_high: Annotated[float, Field(gt=0)] | None = None,
        dual_clip: Annotated[float, Field(gt=1)] | None = None,
        clip_schedule: ClipSchedule | None = None,
        decision_discount: Annotated[float, Field(gt=0, le=1)] = 1.0,
        step_weight: Literal["none", "noise"] = "none",
        ratio_bounds: tuple[float, float] = (0.0, 5.0),
        sapo_temperatures: tuple[float, float] = (1.0, 1.05),
        regression_scale: Annotated[float, Field(gt=0)] = 1.0,
        divergence_threshold: Annotated[float, Field(gt=0)] = 1e-5,
        aggregation: losses.Aggregation = "sequence",
        block_rows: Annotated[int, Field(ge=1)] | None = None,
        max_decisions: Annotated[int, Field(ge=1)] | None = None,
        mask_truncated: bool | Literal["exclude"] = False,
        advantage: CreditMethod = "group",
        completion: Completion = "ode",
        calibrate_noise: NoiseCalibration | None = None,
        process_coef: Annotated[float, Field(ge=0)] = 0.0,
        extremes: Annotated[int, Field(ge=1)] | None = None,
        advantage_clip: Annotated[float, Field(gt=0)] | None = 5.0,
        soft_advantage: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.0),
        advantage_scale: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (1.0, 1.0),
        whiten: bool = False,
        gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
        lam: Annotated[float, Field(ge=0, le=1)] = 0.95,
        value: ValueHead = ValueHead(),  # noqa: B008 (frozen)
        kl_coef: Annotated[float, Field(ge=0)] = 0.0,
        kl: KLName | None = None,
        kl_gradient: losses.KLGradient = "value",
        kl_ratio_weight: bool = False,
        kl_in: Literal["loss", "reward"] = "loss",
        entropy_coef: Annotated[float, Field(ge=0)] = 0.0,
        entropy_target: EntropyTarget | None = None,
        top_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0,
        importance: Importance | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        rethinking: Rethinking | None = None,
        ground_truth: GroundTruth | None = None,
        hints: Hints | None = None,
        consistency: Consistency | None = None,
        prompt_choice: PromptChoice | None = None,
        replay: Replay | None = None,
        drop_silent: bool | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
        minibatches: Annotated[int, Field(ge=1)] = 1,
    ):
        if group_size == 1 and advantage in GROUP_BASELINES:
            raise UserError(
                f"algorithm.group_size is 1, but advantage '{advantage}' compares the samples of a group: "
                "use 2 or more, or advantage 'global'"
            )
        if kl_in == "reward" and advantage in ("gdpo", "decoupled", *PER_COLUMN):
            raise UserError(f"algorithm.kl_in is reward, but advantage '{advantage}' has no single reward: use loss")
        if replay is not None and (advantage in PER_DECISION | PER_COLUMN or whiten):
            raise UserError(f"algorithm.replay keeps one advantage a sample, which '{advantage}' here has not")
        if replay is not None and (clip_schedule is not None or decision_discount < 1):
            raise UserError("algorithm.replay keeps tokens, which have no clip_schedule or decision_discount")
        self.group_size = group_size
        self.objective = Objective(
            objective,
            clip_range,
            clip_range_high,
            dual_clip,
            ratio_bounds,
            divergence_threshold,
            sapo_temperatures,
            regression_scale,
        )
        self.clip_schedule = clip_schedule
        self.decision_discount = decision_discount
        self.step_weight = step_weight
        self.aggregation = aggregation
        self.block_rows = block_rows or group_size
        self.max_decisions = max_decisions
        self.mask_truncated = mask_truncated
        self.credit = Credit(
            advantage, advantage_clip, whiten, gamma, lam, soft_advantage, advantage_scale, extremes, process_coef
        )
        if calibrate_noise is not None and advantage != "gain":
            raise UserError(
                f"algorithm.calibrate_noise goes by the gains of steps, which advantage '{advantage}' has not"
            )
        self.prospects = Prospects(completion, calibrate_noise) if advantage == "gain" else None
        self.kl_coef = kl_coef
        self.kl = kl
        self.kl_in_loss = kl_coef > 0 and kl_in == "loss"
        self.kl_in_reward = kl_coef > 0 and kl_in == "reward"
        self.entropy = EntropyBonus(entropy_coef, entropy_target)
        self.value = value if advantage == "gae" else None
        self.terms = PolicyLoss(
            self.objective,
            kl_coef if self.kl_in_loss else 0.0,
            kl,
            kl_gradient,
            kl_ratio_weight,
            self.entropy,
            self.value,
        )
        self.top_entropy = top_entropy
        self.importance = importance
        # In this order: first groups are mended, then what still teaches nothing is replaced, then scores change.
        hooks = (rethinking, hints, ground_truth, dynamic_sampling, consistency)
        self.hooks = [hook for hook in hooks if hook is not None]
        self.record = PromptRecord(prompt_choice) if prompt_choice is not None else None
        self.buffer = ReplayBuffer(replay) if replay is not None else None
        self.drop_silent = drop_silent
        self.epochs = epochs
        self.minibatches = minibatches
        self.needs_reference = kl_coef > 0
        self.needs_entropy = self.entropy.used or top_entropy < 1
        needed = {
            "means": self.objective.needs_means or (self.kl_in_loss and kl in ("exact", "exact_dt")),
            "entropy": self.needs_entropy,
            "values": self.value is not None,
            "generate": advantage == "remax",
            "complete": advantage == "gain",
            "branches": advantage == "tree",
            "steered": process_coef > 0,
            "given": any(getattr(hook, "verbs", None) for hook in self.hooks) or replay is not None,
        }
        self.verbs = frozenset({"rollout", "decisions", *(verb for verb, needs in needed.items() if needs)})

    def defaults_for(self, verbs: frozenset[str]) -> dict[str, Any]:
        """What options that are not given stand for, with a policy that offers ``verbs``."""
        gaussian = "means" in verbs
        low, high = default_clip_range(self.objective.name, gaussian)
        high = high if self.objective.clip_range is None else self.objective.clip_range
        return {
            "clip_range": low,
            "clip_range_high": high,
            "kl": "exact" if gaussian else "k3",
            "block_rows": self.block_rows,
            "drop_silent": self._drops_silent(verbs),
        }

    def _drops_silent(self, verbs: frozenset[str]) -> bool:
        if self.drop_silent is not None:
            return self.drop_silent
        if self.objective.name == "regression":
            return False
        return "means" in verbs or not (self.kl_in_loss or self.entropy.used or self.value)

    def _parts(self) -> dict[str, Any]:
        parts = {"entropy": self.entropy, "prompts": self.record, "replay": self.buffer, "prospects": self.prospects}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        found = {name: part.state() for name, part in self._parts().items()}
        return {name: state for name, state in found.items() if state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        parts = self._parts()
        for name in state.keys() & parts.keys():
            parts[name].load_state(state[name])

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Experience:
        if missing := sorted(self.verbs - context.policy.verbs):
            advice = f" ({VERB_HELP[missing[0]]})" if missing[0] in VERB_HELP else ""
            raise UserError(f"the algorithm needs a policy that offers {', '.join(missing)}{advice}")
        context.policy.keep_mean = self.objective.needs_means
        if "complete" in context.policy.verbs:
            context.policy.noise_scale = self.prospects and self.prospects.scale
        if self.needs_entropy:
            context.policy.keep_entropy = True
        if self.record is not None:
            prompts = self.record.choose(context, prompts, step)
        rollout = roll_out(context, prompts, self.group_size, step)
        batch = Batch(rollout, score(context, rollout, step))
        if self.record is not None:
            self.record.observe(batch)
        for hook in self.hooks:
            batch = hook(context, batch, step)
        experience = self._experience(context, batch, step)
        if self.buffer is not None:
            experience = self.buffer(context, experience, batch.given, step)
        return experience

    def _experience(self, context: Context, batch: Batch, step: int) -> Experience:
        """Share the scores out over decisions; forwards that this needs are run here, without gradient."""
        rollout, scores = batch.rollout, batch.scores
        mask = rollout.mask.cpu()
        if self.mask_truncated and rollout.samples.truncated is not None:
            mask = mask & ~rollout.samples.truncated.cpu()[:, None]
        if self.credit.method in PER_DECISION:
            mask = mask & ~scores.total.isnan().cpu()[:, None]
        # Only estimates from log-probs can be kept for later passes; exact KLs are computed with each micro-batch.
        estimated = self.kl in ("k1", "k2", "k3") or (self.kl is None and "means" not in context.policy.verbs)
        keep_reference = self.kl_in_reward or (self.kl_in_loss and estimated and self.epochs > 1)
        reference = reference_logp(context, rollout) if keep_reference else None
        penalty = self.kl_coef * (rollout.logp.cpu() - reference) * rollout.mask.cpu() if self.kl_in_reward else None
        if penalty is not None:
            context.tally.mean("kl/reward", (rollout.logp.cpu() - reference)[rollout.mask.cpu()])
        baseline = score_greedy(context, rollout, step) if self.credit.method == "remax" else None
        turns = context.scorer.turns(rollout.samples, step) if self.credit.method in PER_DECISION else None
        before = self.prospects and self.prospects(context, rollout, scores.total, step)
        advantage, returns = self.credit(scores, rollout, mask, penalty, baseline, turns, before)
        groups = int(rollout.group.max()) + 1
        alive = torch.zeros(groups).index_add_(0, rollout.group.cpu(), advantage.abs().sum(1)) > 0
        context.tally.mean("groups/without_signal", (~alive).float())
        rollout, factor = self._factor(context, rollout, mask, step)
        clip_scale = None
        if self.clip_schedule is not None:
            clip_scale = self.clip_schedule.scale(*turns_of(rollout, mask).places())
        return Experience(rollout, advantage, mask, factor, clip_scale, reference, returns)

    def _factor(self, context: Context, rollout: Rollout, mask: Tensor, step: int) -> tuple[Rollout, Tensor | None]:
        """What multiplies the policy term, and the rollout with the log-probs that ratios are to be taken against."""
        factors = []
        if self.importance is not None or self.top_entropy < 1:
            found = replay(context, rollout)
        if self.top_entropy < 1:
            factors.append(top_entropy_mask(found.entropy, mask, self.top_entropy))
        if self.importance is not None:
            now = torch.where(rollout.mask.cpu(), found.logp, 0.0)
            weights = self.importance.weights(now, rollout.logp.cpu(), mask)
            context.tally.mean("importance/mean", weights, mask.float())
            factors.append(weights)
            rollout = replace(rollout, logp=now.to(rollout.logp.device))
        if self.decision_discount < 1:
            factors.append(discount_factor(*turns_of(rollout, mask).places(), self.decision_discount))
        if self.step_weight == "noise":
            factors.append(noise_weights(rollout, mask))
        if self.value is not None and step < self.value.warmup:
            factors.append(torch.zeros(mask.shape))
        return rollout, math.prod(factors) if factors else None

    def updates(self, context: Context, experience: Experience, step: int) -> Iterator[Update]:
        """Optimiser steps. Rows that nothing acts on count in the totals but nothing is computed for them."""
        parts = split_groups(experience.rollout.group.cpu(), self.minibatches)
        silent_too = not self._drops_silent(context.policy.verbs)
        limit = self.max_decisions or getattr(context.policy, "max_decisions", None)
        for number in range(self.epochs * self.minibatches):
            part = parts[number % self.minibatches]
            mask = experience.mask[part]
            decisions = int(distributed.total(mask.sum().item()))
            counted = mask.any(1) if self.mask_truncated == "exclude" else torch.ones(len(part))
            weight = losses.aggregation_weights(
                mask,
                self.aggregation,
                rows=max(int(distributed.total(counted.sum().item())), 1),
                decisions=decisions,
                max_decisions=limit or mask.shape[1],
                block_rows=self.block_rows,
                blocks=int(distributed.total(-(-len(part) // self.block_rows))),
            )
            token_weight = mask.float() / max(decisions, 1)
            centre = self._centre(context, experience, part, on_policy=number == 0)
            takes_part = mask.any(1) if silent_too else (experience.advantage[part] != 0).any(1)
            rows = part[takes_part]
            weights = (weight[takes_part], token_weight[takes_part], centre[takes_part])
            micro_batches = self._micro_batches(context, experience[rows], weights, first=number == 0)
            yield Update(int(distributed.total(len(rows))), micro_batches)
            self.entropy.adapt()

    def _centre(self, context: Context, experience: Experience, part: Tensor, on_policy: bool) -> Tensor:
        """Mean log-ratio ``[n, 1]`` of each row's group, which Reg-GRPO subtracts; 0 before the first update."""
        centre = torch.zeros(len(part), 1)
        if self.objective.name != "regression" or on_policy:
            return centre
        rollout, mask = experience.rollout[part], experience.mask[part]
        ratio = losses.sequence_log_ratio(replay(context, rollout).logp, rollout.logp.cpu(), mask)[:, 0]
        group = rollout.group.cpu().unique(return_inverse=True)[1]
        return (group_sums(ratio, group) / group_sums(torch.ones_like(ratio), group))[:, None]

    def _micro_batches(
        self, context: Context, experience: Experience, weights: tuple[Tensor, Tensor, Tensor], first: bool
    ) -> Iterator[MicroBatch]:
        weight, token_weight, centre = weights
        for rows in row_chunks(len(experience), context.micro_batch_size):
            part = experience[rows]
            reference = ReferenceScores(part.rollout)
            everything = [list(range(weight.shape[1]))]
            chunks = everything if self.objective.whole_samples else context.policy.decision_chunks(part.rollout)
            for columns in chunks:
                yield MicroBatch(
                    part,
                    columns,
                    weight[rows][:, columns],
                    token_weight[rows][:, columns],
                    centre[rows],
                    reference,
                    first,
                )

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        return self.terms(context, micro_batch)

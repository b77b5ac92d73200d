"""The preference family: make the better of two outputs likelier than the worse one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks
from mmrl.algorithms.pairs import Pairing, Pairs, check_given_pairs, given_pairs, pairs_of_groups
from mmrl.errors import UserError
from mmrl.pair_losses import NEED_LOGP, REFERENCE_FREE, PairLoss, PairScores, mixed_pair_loss
from mmrl.policy import Policy
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Rollout, Samples


@dataclass
class MicroBatch:
    """Some pairs with the noise seed of each; ``pairs_in_update`` divides the loss."""

    pairs: Pairs
    seeds: list[int]
    pairs_in_update: int


class PreferenceOptimisation:
    """DPO and its relatives: fit the better and the worse of a pair under policy and reference.

    Works on whatever ``fit`` measures: for tokens it is DPO, for diffusion Diffusion-DPO (arXiv 2311.12908), for flows
    Flow-DPO.

    Args:
        source: ``online`` rolls out a group and pairs its best with its worst; ``offline`` takes the columns ``chosen``
            and ``rejected`` of the data, texts for a language model, pictures or clips for a diffusion model.
        loss: see :func:`mmrl.pair_losses.pair_loss`; or several with their weights, such as MPO's
            ``{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}``.
        group_size: samples per prompt, online.
        beta: strength of the preference. When not given 0.1 for tokens and 100 for denoisers, where it is half of
            Diffusion-DPO's (published 2000 to 5000 there means 1000 to 2500).
        label_smoothing: chance that a label is wrong: of sigmoid (cDPO), robust and exo_pair.
        soft_labels: online, of sigmoid: a temperature; that chance is then ``sigmoid(-margin / soft_labels)`` with the
            pair's lead in score, or in log-odds where pairs are compared.
        target_margin: SimPO's.
        pairs: ``best_worst`` one pair a group; ``ranked`` best with worst, second with second worst and so on;
            ``compared`` first member with second, third with fourth..., as a reward that compares (a judge) decides.
        noise_draws: noise and timestep draws per pair; each is a term of its own.
        refresh_reference: every so many steps the reference becomes the current policy; never when not given.
        epochs: passes over the pairs of a rollout.
    """

    needs_gradient_of_reward = False

    def __init__(
        self,
        source: Literal["online", "offline"] = "online",
        loss: PairLoss | dict[PairLoss, float] = "sigmoid",
        group_size: Annotated[int, Field(ge=2)] = 8,
        beta: Annotated[float, Field(gt=0)] | None = None,
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
        soft_labels: Annotated[float, Field(gt=0)] | None = None,
        target_margin: Annotated[float, Field(ge=0)] = 0.5,
        pairs: Pairing = "best_worst",
        noise_draws: Annotated[int, Field(ge=1)] = 1,
        refresh_reference: Annotated[int, Field(ge=1)] | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
    ):
        self.losses: dict[PairLoss, float] = dict(loss) if isinstance(loss, dict) else {loss: 1.0}
        if not self.losses:
            raise UserError("algorithm.loss is empty: name at least one loss, such as sigmoid")
        if "exo_pair" in self.losses and label_smoothing == 0:
            raise UserError("algorithm.loss exo_pair needs algorithm.label_smoothing above 0, for instance 0.001")
        self.online = source == "online"
        if soft_labels is not None and (not self.online or label_smoothing or "sigmoid" not in self.losses):
            raise UserError("algorithm.soft_labels needs source online, loss sigmoid and no label_smoothing")
        # Offline a prompt brings its two answers.
        self.group_size = group_size if self.online else 2
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.soft_labels = soft_labels
        self.target_margin = target_margin
        self.pairs = pairs
        self.noise_draws = noise_draws
        self.refresh_reference = refresh_reference
        self.epochs = epochs
        self.verbs = frozenset({"rollout", "fit"} if self.online else {"fit"})
        self.needs_rewards = self.online
        self.needs_comparison = self.online and pairs == "compared"
        self.needs_reference = not self.losses.keys() <= REFERENCE_FREE

    def defaults_for(self, verbs: frozenset[str]) -> dict[str, Any]:
        """What options that are not given stand for, with a policy that offers ``verbs``.

        Raises:
            UserError: a loss is one of log-probs, which denoisers do not have.
        """
        refused = sorted(NEED_LOGP & self.losses.keys())
        if "means" in verbs and refused:
            raise UserError(
                f"algorithm.loss {refused[0]} is made of log-probs per token, which a denoiser does not have: "
                "use one of sigmoid, robust, hinge, bco_pair, nca_pair, exo_pair, sppo_hard, apo_zero, apo_down"
            )
        return {"beta": 100.0 if "means" in verbs else 0.1}

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Look at given pairs before training; see :func:`mmrl.algorithms.pairs.check_given_pairs`."""
        if not self.online:
            check_given_pairs(prompts)

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Pairs:
        if self.refresh_reference and step > 0 and step % self.refresh_reference == 0:
            context.policy.parameters.take_snapshot("reference")
        if not self.online:
            return given_pairs(context.policy, prompts)
        return pairs_of_groups(context, roll_out(context, prompts, self.group_size, step), step, self.pairs)

    def updates(self, context: Context, experience: Pairs, step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        for epoch in range(self.epochs):
            yield Update(size, self._micro_batches(context, experience, size, step, epoch))

    def _micro_batches(self, context: Context, pairs: Pairs, size: int, step: int, epoch: int) -> Iterator[MicroBatch]:
        # Winner and loser run together, so a pair counts as two samples.
        for rows in row_chunks(len(pairs), max(1, context.micro_batch_size // 2)):
            part = pairs[rows]
            for draw in range(self.noise_draws):
                seeds = [derive_seed(context.seed, "fit", step, epoch, draw, name) for name in part.names]
                yield MicroBatch(part, seeds, size)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, both = context.policy, micro_batch.pairs.both
        seeds = micro_batch.seeds * 2
        fit = policy.fit(both, seeds)
        reference = fit.detach()
        if self.needs_reference:
            with torch.no_grad(), policy.reference():
                reference = policy.fit(both, seeds)
        won, lost = (reference - fit).chunk(2)
        better, worse = (-fit).chunk(2)
        pair = PairScores(better, worse, won, lost, *self._lengths(policy, both, fit).chunk(2))
        beta = self.beta or self.defaults_for(policy.verbs)["beta"]
        smoothing = self.label_smoothing
        if self.soft_labels is not None:
            smoothing = (-micro_batch.pairs.margin / self.soft_labels).sigmoid().to(fit)
        per_pair = mixed_pair_loss(self.losses, pair, beta, smoothing, self.target_margin)
        context.tally.mean("loss", per_pair)
        margin = won - lost if self.needs_reference else better - worse
        context.tally.mean("pairs/accuracy", (margin > 0).float())
        context.tally.mean("pairs/logit", beta * margin)
        context.tally.mean("fit/winner", fit.chunk(2)[0])
        return per_pair.sum() / (micro_batch.pairs_in_update * self.noise_draws)

    def _lengths(self, policy: Policy, both: Rollout | Samples, fit: Tensor) -> Tensor:
        """Decisions that each ``fit`` is a sum over; 1 where it is a mean already, or where nothing asks for it."""
        if getattr(policy, "fit_reduction", "sum") == "mean" or not isinstance(both, Rollout):
            return torch.ones_like(fit)
        return both.mask.sum(1).to(fit)

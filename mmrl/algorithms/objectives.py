"""The policy term of the loss: which function of log-probs and advantages, and with which bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmrl import losses
from mmrl.types import Decisions

ObjectiveName = Literal[
    "clip", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "nft", "reinforce", "regression", "guard", "dppo"
]
# A sample's decisions enter these together.
WHOLE_SAMPLE = frozenset({"gspo", "gspo_token", "gmpo", "regression"})
NEED_MEANS = frozenset({"guard", "dppo"})


def default_clip_range(objective: ObjectiveName, gaussian: bool) -> tuple[float, float]:
    """Lower and upper clip bound where the config gives none.

    Gaussian log-probs are means over the action's elements, so their ratios stay within 1e-4 of 1; those of tokens do
    not. Token values are those of PPO, GSPO (arXiv 2507.18071) and, in log space, GMPO (arXiv 2507.20673).
    """
    if gaussian:
        return 1e-4, 1e-4
    return {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "gmpo": (0.4, 0.4)}.get(objective, (0.2, 0.2))


@dataclass(frozen=True)
class Objective:
    """Loss per decision; see :class:`mmrl.algorithms.policy_gradient.PolicyGradient` for the options."""

    name: ObjectiveName
    clip_range: float | None
    clip_range_high: float | None
    dual_clip: float | None
    ratio_bounds: tuple[float, float]
    divergence_threshold: float
    temperatures: tuple[float, float]
    regression_scale: float

    @property
    def needs_means(self) -> bool:
        """Whether it takes the means of Gaussian decisions."""
        return self.name in NEED_MEANS

    @property
    def whole_samples(self) -> bool:
        """Whether all decisions of a sample must be at hand at once."""
        return self.name in WHOLE_SAMPLE

    def bounds(self, gaussian: bool) -> tuple[float, float]:
        """Lower and upper clip bound."""
        low, high = default_clip_range(self.name, gaussian)
        if self.clip_range is not None:
            low = high = self.clip_range
        return low, high if self.clip_range_high is None else self.clip_range_high

    def __call__(
        self,
        decisions: Decisions,
        old_logp: Tensor,
        mask: Tensor,
        advantage: Tensor,
        old_mean: Tensor | None = None,
        centre: Tensor | None = None,
        clip_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss per decision and the ratio it was made from, both ``[n, t]``.

        Args:
            decisions: under the current policy, with gradient.
            old_logp, mask, advantage: ``[n, t]``; the policy that acted, what counts, and the advantage.
            old_mean: ``[n, t, ...]`` for ``guard`` and ``dppo``.
            centre: ``[n, 1]`` mean log-ratio of each sample's group, for ``regression``.
            clip_scale: ``[n, t]`` multiplies both clip bounds.
        """
        logp = decisions.logp
        low, high = self.bounds(decisions.mean is not None)
        if clip_scale is not None:
            low, high = low * clip_scale, high * clip_scale
        if self.name == "gspo":
            ratio = losses.sequence_log_ratio(logp, old_logp, mask).exp()
        elif self.name == "gspo_token":
            ratio = losses.sequence_token_log_ratio(logp, old_logp, mask).exp()
        elif self.name == "guard":
            ratio = losses.guard_log_ratio(decisions.action, decisions.mean, old_mean, decisions.std).exp()
        else:
            ratio = (logp - old_logp).exp()

        if self.name == "cispo":
            return losses.cispo_loss(logp, ratio, advantage, *self.ratio_bounds), ratio
        if self.name == "sapo":
            return losses.soft_clipped_loss(ratio, advantage, *self.temperatures), ratio
        if self.name == "gmpo":
            return losses.geometric_mean_loss(logp - old_logp, advantage, mask, low, high), ratio
        if self.name == "nft":
            return losses.negative_aware_loss(ratio, advantage), ratio
        if self.name == "reinforce":
            return losses.reinforce_loss(logp, advantage), ratio
        if self.name == "regression":
            loss = losses.regression_loss(logp - old_logp, advantage, mask, self.regression_scale, centre)
            return loss, ratio
        if self.name == "dppo":
            divergence = losses.gaussian_kl(decisions.mean, old_mean, decisions.std)
            return losses.divergence_masked_loss(ratio, advantage, divergence, self.divergence_threshold), ratio
        loss = losses.clipped_loss(ratio, advantage, low, high, self.dual_clip)
        # GRPO-Guard evens out the gradient over time steps of unequal length.
        return (loss / decisions.dt if self.name == "guard" else loss), ratio

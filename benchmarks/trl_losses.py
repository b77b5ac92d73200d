"""Numbers of TRL's own loss code for ``tests/golden/trl_losses.json``: run it where TRL is installed.

``python benchmarks/trl_losses.py [OUT.json]`` feeds a handmade batch to ``_compute_loss`` of TRL's trainers. Their
model is left out: log-probs and entropies are free parameters, so the gradients are those with respect to them.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import nn
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

OUT = Path(__file__).parent.parent / "tests/golden/trl_losses.json"
GRPO_CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "clip_higher": {"epsilon_high": 0.28},
    "delta": {"delta": 1.5},
    "k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "k3_ratio_weighted": {"beta": 0.1, "use_bias_correction_kl": True},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.4},
    "sapo": {"loss_type": "sapo"},
    "top_entropy": {"top_entropy_quantile": 0.3},
    "entropy_bonus": {"entropy_coef": 0.05},
    "gmpo": {"epsilon": 0.4, "epsilon_high": 0.4},
}
DPO_CASES = (
    "sigmoid",
    "robust",
    "ipo",
    "hinge",
    "bco_pair",
    "nca_pair",
    "exo_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "mpo",
)


def batch() -> dict[str, torch.Tensor]:
    """Six samples of up to seven tokens; ratios reach beyond every clip, two advantages are 0 and one row is masked."""
    torch.manual_seed(0)
    logp = -2.5 * torch.rand(6, 7) - 0.1
    lengths = torch.tensor([7, 5, 3, 6, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    mask[5] = False
    return {
        "logp": logp,
        "old_logp": logp + 0.4 * torch.randn(6, 7),
        "ref_logp": logp + 0.5 * torch.randn(6, 7),
        "entropy": 2 * torch.rand(6, 7),
        "advantage": torch.tensor([1.2, -0.7, 0.0, -1.5, 0.9, 0.4]),
        "mask": mask,
    }


class Accelerator:
    """One process."""

    num_processes, sync_gradients, device = 1, True, torch.device("cpu")

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x

    def pad_across_processes(self, x: Any, dim: int = 0, pad_index: float = 0) -> Any:
        return x


def grpo_case(data: dict[str, torch.Tensor], options: dict[str, Any], trainer_class: type) -> dict[str, Any]:
    """Loss and gradients of one configuration."""
    args = {
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "max_completion_length": 7,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
    } | options
    logp, entropy = nn.Parameter(data["logp"].clone()), nn.Parameter(data["entropy"].clone())
    high = args["epsilon"] if args["epsilon_high"] is None else args["epsilon_high"]
    trainer = object.__new__(trainer_class)
    trainer.__dict__ |= {
        "args": SimpleNamespace(**args),
        "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": args["entropy_coef"] != 0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_low": args["epsilon"],
        "epsilon_high": high,
        "_metrics": {"train": defaultdict(list)},
        **{
            key: args[key]
            for key in (
                "beta",
                "loss_type",
                "importance_sampling_level",
                "top_entropy_quantile",
                "entropy_coef",
                "max_completion_length",
            )
        },
    }
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, entropy, None)
    ids = torch.zeros(6, 7, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": data["mask"].long(),
        "advantages": data["advantage"],
        "old_per_token_logps": data["old_logp"],
        "ref_per_token_logps": data["ref_logp"],
        "num_items_in_batch": data["mask"].sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    found = {"loss": loss.item(), "logp_grad": logp.grad.tolist()}
    return found if entropy.grad is None else found | {"entropy_grad": entropy.grad.tolist()}


def pair_case(data: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    """TRL's DPO, CPO and ORPO on the first three rows as better and the last three as worse ones."""
    mask = data["pair_mask"]
    table = nn.Parameter(data["logp"].clone())
    logps = (table * mask).sum(1)
    reference = (data["ref_logp"] * mask).sum(1)
    length = mask.sum(1)
    if kind in DPO_CASES:
        kinds, weights = (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]) if kind == "mpo" else ([kind], [1.0])
        trainer = object.__new__(DPOTrainer)
        trainer.__dict__ |= {
            "accelerator": Accelerator(),
            "model": SimpleNamespace(training=True),
            "args": SimpleNamespace(discopop_tau=0.05),
            "aux_loss_enabled": False,
            "ld_alpha": None,
            "precompute_ref_logps": True,
            "f_divergence_type": "reverse_kl",
            "beta": 0.3,
            "label_smoothing": 0.1,
            "loss_types": kinds,
            "loss_weights": weights,
            "use_weighting": False,
            "_metrics": {"train": defaultdict(list)},
            "_total_train_tokens": 0,
            "_tp_size": 1,
        }

        def model(**unused: Any) -> Any:
            kept = table * mask
            unread = torch.zeros(6, 7)
            return SimpleNamespace(log_probs=kept, entropy=unread, mean_logits=unread, is_top1=unread.bool())

        model.training = True
        trainer.model = model
        # The mask covers the prompt's last token too, which the shift drops.
        whole = torch.cat([torch.zeros(6, 1), mask], 1)
        inputs = {
            "input_ids": torch.zeros(6, 8, dtype=torch.long),
            "attention_mask": torch.ones(6, 8, dtype=torch.long),
            "completion_mask": whole.long(),
            "ref_chosen_logps": reference[:3],
            "ref_rejected_logps": reference[3:],
        }
        loss = trainer._compute_loss(model, inputs, False)
    else:
        mean = logps / length
        if kind == "simpo":
            trainer = object.__new__(CPOTrainer)
            trainer.__dict__ |= {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.0}
            trainer.__dict__ |= {"beta": 0.3, "accelerator": Accelerator()}
            loss = trainer.cpo_loss(mean[:3], mean[3:])[0].mean()
        else:
            trainer = object.__new__(ORPOTrainer)
            trainer.__dict__ |= {"beta": 0.3, "accelerator": Accelerator()}
            loss = -mean[:3].mean() - trainer.odds_ratio_loss(mean[:3], mean[3:])[0].mean()
    loss.backward()
    return {"loss": loss.item(), "logp_grad": table.grad.tolist()}


def main() -> None:
    data = batch()
    # Better answers of one length, since TRL's sft term is a mean over all their tokens and ours one of means.
    lengths = torch.tensor([5, 5, 5, 6, 1, 4])
    data["pair_mask"] = (torch.arange(7) < lengths[:, None]).float()
    grpo = {
        name: {"options": options} | grpo_case(data, options, GMPOTrainer if name == "gmpo" else GRPOTrainer)
        for name, options in GRPO_CASES.items()
    }
    pairs = {kind: pair_case(data, kind) for kind in (*DPO_CASES, "simpo", "orpo")}
    out = {
        "trl": importlib.metadata.version("trl"),
        "batch": {key: value.tolist() for key, value in data.items()},
        "grpo": grpo,
        "pairs": pairs,
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(out, default=float) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {path} from {trl.__name__} {out['trl']}\n")


if __name__ == "__main__":
    main()

"""TRL's GRPOTrainer as ``vlm_step.py`` runs it: one step at a time, so that another contestant can run in between.

TRL is no dependency of mmrl: install it where only this benchmark sees it, with ``datasets``, which it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vlm_rows import score


def reward(completions: Sequence[Sequence[dict[str, str]]], **columns: Any) -> list[float]:
    """:func:`vlm_rows.score` with the signature TRL wants."""
    return [score(completion[0]["content"]) for completion in completions]


def build_trainer(
    folder: Path,
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    prompts: int,
    group_size: int,
    max_new_tokens: int,
    lr: float,
    clip_range: float,
    suppressed: Sequence[int] = (),
    steps: int = 1,
    **options: Any,
) -> Any:
    """A GRPOTrainer on the CPU in float32 whose step is one rollout, one backward and one update.

    Args:
        suppressed: ids that are never sampled; empty leaves TRL's own choice.
        options: further fields of ``GRPOConfig``.
    """
    from datasets import Dataset, Features, Image, List, Value
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), "images": List(Image()), "answer": Value("string")})
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["text"]}],
                "images": [row["image"]],
                "answer": row["answer"],
            }
            for row in rows
        ],
        features=features,
    )
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        seed=0,
        per_device_train_batch_size=prompts * group_size,
        num_generations=group_size,
        max_completion_length=max_new_tokens,
        generation_kwargs={"suppress_tokens": list(suppressed)} if len(suppressed) else None,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        epsilon=clip_range,
        beta=0.0,
        **({"loss_type": "grpo"} | options),
    )
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=processor)
    # It prints the last metrics.
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Any, began: Callable[[int], None], ended: Callable[[int], None]) -> None:
    """Run ``trainer``; ``ended`` is called after every step and ``began`` before it, with its number from 0.

    What lies between is a whole step with the reading of its rows. For step 0 it is the start of the training as well.
    """
    from transformers import TrainerCallback

    class Interruption(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended(state.global_step - 1)
            began(state.global_step)

    trainer.add_callback(Interruption())
    began(0)
    trainer.train()


def losses(
    trainer: Any, rows: Sequence[dict[str, Any]], completions: Sequence[Sequence[int]], old_logp: torch.Tensor | None
) -> tuple[float, float, dict[str, Any]]:
    """Loss, gradient norm and inputs of TRL on given completions, scored and weighed by TRL itself.

    Args:
        rows: of the trainer's data set, one for each completion.
        completions: token ids.
        old_logp: ``[N, T]``, None for those of the model as it is.
    """
    trainer._generate_single_turn = lambda *args, **kwargs: ([list(ids) for ids in completions], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(list(rows))
    if old_logp is not None:
        inputs["old_per_token_logps"] = old_logp
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), float("inf"))
    return loss.item(), norm.item(), inputs

"""A negative preference model in the unconditional half of guidance."""

import pytest
import torch
from zoo import ZOO

from mmrl import Prompt
from mmrl.errors import UserError
from pipelines import DiffusionPolicy, LoRA
from pipelines.guidance import NegativeBranch, NegativeModel
from pipelines.scheduler_seam import Sample

PROMPTS = [Prompt("a red circle"), Prompt("two green triangles")]
SCALE = 3.0


def make(name="StableDiffusion3", guidance=SCALE, **options):
    entry = ZOO[name]()
    call = {**entry.call, "guidance_scale": guidance}
    return DiffusionPolicy(entry.pipe, num_steps=1, call=call, **{"batch_size": 4, **options})


def nudge(policy, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def latents(policy, branch=None):
    plan = Sample(policy.kernel)
    if branch is None:
        return policy.seam.run(PROMPTS, policy.eval, plan, [1, 2])
    with branch.active(len(PROMPTS)):
        return policy.seam.run(PROMPTS, policy.eval, plan, [1, 2])


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion"])
@torch.no_grad()
def test_only_the_unconditional_half_has_the_negative_weights(tmp_path, name):
    """One step is linear in both halves: L = (negative alone) - g (its conditional half) + g (the own one)."""
    other, other_cond = make(name), make(name, guidance=1.0)
    for policy in (other, other_cond):
        nudge(policy, 5)
    other.export(tmp_path)
    own, own_cond = make(name), make(name, guidance=1.0)
    branch = NegativeBranch(own.pipe, NegativeModel(str(tmp_path)))
    expected = latents(other) - SCALE * latents(other_cond) + SCALE * latents(own_cond)
    found = latents(own, branch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - latents(own)).abs().max() > 1e-2
    # With no strength it is plain guidance, and nothing stays behind.
    none = NegativeBranch(own.pipe, NegativeModel(str(tmp_path), strength=0.0))
    torch.testing.assert_close(latents(own, none), latents(own), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_of_a_run_as_the_negative_model(tmp_path):
    """They are merged into the start's weights, whatever adapters train; ``own`` keeps a share of those."""
    opposite = make(lora=LoRA(rank=2))
    nudge(opposite, 5)
    opposite.export(tmp_path)
    trained = [make(lora=LoRA(rank=2), negative=NegativeModel(str(tmp_path), own=own)) for own in (0.0, 1.0)]
    for policy in trained:
        nudge(policy, 5)
        pictures = policy.generate(PROMPTS, [1, 2]).images
        assert (pictures - make().generate(PROMPTS, [1, 2]).images).abs().max() > 1e-3
    # Trained and negative are the same weights here, so without a share of the own ones guidance is plain.
    torch.testing.assert_close(
        trained[0].generate(PROMPTS, [1, 2]).images, opposite.generate(PROMPTS, [1, 2]).images, rtol=1e-3, atol=1e-4
    )
    assert all(parameter.requires_grad for parameter in trained[0].parameters)


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        make(negative=NegativeModel(str(tmp_path / "none")))
    with pytest.raises(UserError, match="neither LoRA adapters nor a whole pipeline"):
        make(negative=NegativeModel(str(tmp_path)))
    make().export(tmp_path)
    with pytest.raises(UserError, match="guidance whose two halves share a network call"):
        make(guidance=1.0, negative=NegativeModel(str(tmp_path))).generate(PROMPTS, [1, 2])

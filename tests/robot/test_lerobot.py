"""What comes from the LeRobot project: its environments, which run as gymnasium ids, and its flow policies."""

import json

import pytest
import torch
from zoo.vlms import build_vlm

from mmrl.errors import UserError
from mmrl.types import Prompt
from pipelines.robot.demonstrations import starts
from pipelines.robot.envs import make_envs
from pipelines.robot.policy import RobotPolicy

PUSHT = "gym_pusht/PushT-v0"


@pytest.mark.parametrize("options", [{}, {"obs_type": "pixels_agent_pos"}, {"image": 32}])
def test_pusht_runs_by_its_id(options):
    pytest.importorskip("gym_pusht")
    envs = make_envs(PUSHT, 2, processes=0, max_steps=4, **options)
    assert envs.action_low.tolist() == [0, 0]
    assert envs.action_high.tolist() == [512, 512]
    seen, again = envs.reset([3, 3]), envs.reset([3, 4])
    assert torch.equal(seen.state[0], seen.state[1])
    assert torch.equal(seen.state[0], again.state[0])
    assert not torch.equal(again.state[0], again.state[1])
    assert seen.state.shape == (2, 2 if "obs_type" in options else 5)
    assert (None if seen.image is None else seen.image.shape[1:]) == {
        "obs_type": (3, 96, 96),
        "image": (3, 32, 32),
    }.get(next(iter(options), ""))
    step = envs.step([0, 1], torch.full((2, 4, 2), 256.0))
    assert step.truncated.all()
    assert ((step.rewards >= 0) & (step.rewards <= 1)).all()
    assert torch.equal(step.info["coverage"] > 0.95, step.success)
    # The hand has gone to where it was sent.
    hand = step.observation.state[:, :2]
    assert (hand - 256).abs().max() < (again.state[:, :2] - 256).abs().max()


def test_a_policy_on_pusht_replays_exactly():
    pytest.importorskip("gym_pusht")
    torch.manual_seed(0)
    head = {"type": "flow", "hidden": [16], "step": "flow_sde"}
    made = RobotPolicy("mlp", PUSHT, head, horizon=4, envs=4, env_options={"processes": 0, "max_steps": 8})
    rollout = made.rollout([Prompt(id="a", text="push the T", inputs={"seed": 1})], 4, seed=0)
    assert torch.equal(made.decisions(rollout).logp, rollout.logp)


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"no env 'gym_nowhere/PushT-v0'.*; those of gym_nowhere need that package"):
        make_envs("gym_nowhere/PushT-v0", 1, processes=0)


@pytest.fixture(scope="module")
def smolvla(tmp_path_factory):
    """Folder of a SmolVLA of random weights for pictures of 32 pixels, two numbers of state and two of action."""
    pytest.importorskip("lerobot")
    try:
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    except (ImportError, TypeError) as error:
        pytest.skip(f"this LeRobot does not go with what else is installed: {error}")
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("smolvla")
    model, processor = build_vlm("smolvlm")
    model.config.save_pretrained(base)
    processor.save_pretrained(base)
    # SmolVLA asks the tokenizer for these by name.
    marks = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    written = base / "tokenizer_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"model_specific_special_tokens": marks}))
    config = SmolVLAConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        chunk_size=4,
        n_action_steps=4,
        max_state_dim=2,
        max_action_dim=2,
        resize_imgs_with_padding=(56, 56),
        num_steps=4,
        num_vlm_layers=2,
        vlm_model_name=str(base),
        device="cpu",
    )
    torch.manual_seed(0)
    SmolVLAPolicy(config).save_pretrained(folder)
    stats = {
        "observation.state": {"mean": torch.tensor([0.5, 0.4]), "std": torch.tensor([0.2, 0.3])},
        "action": {"mean": torch.tensor([0.1, -0.2]), "std": torch.tensor([0.5, 0.25])},
    }
    for part in make_pre_post_processors(config, dataset_stats=stats):
        part.save_pretrained(folder)
    return str(folder)


def test_smolvla_replays_exactly_and_acts_as_in_lerobot(smolvla):
    torch.set_num_threads(1)
    head = {"type": "flow", "num_steps": 4, "step": "flow_sde"}
    network = {"type": "lerobot", "policy": smolvla}
    made = RobotPolicy(network, "planar:reach", head, horizon=4, envs=4, normalise="none", env_options={"max_steps": 8})
    rollout = made.rollout(starts("planar:reach", 2), 2, seed=0)
    logp = made.decisions(rollout).logp
    assert torch.equal(logp.detach(), rollout.logp)
    logp.sum().backward()
    trained = [name for name, p in made.encoder.policy.named_parameters() if p.grad is not None]
    assert trained
    assert not any("vlm." in name for name in trained)
    encoder, seen = made.encoder, make_envs("planar:reach", 2).reset([0, 1])
    pictures = {"observation.images.image": seen.image / 255}
    batch = encoder.before({"observation.state": seen.state, "task": list(seen.instruction), **pictures})
    draws = made.head.draw(2, torch.Generator().manual_seed(0), deterministic=True)
    expected = encoder.policy.predict_action_chunk(batch, noise=draws.reshape(2, 4, 2))
    with torch.no_grad():
        found = made.head.sample(encoder(seen), draws, deterministic=True).actions
    assert torch.allclose(found, expected, atol=1e-5)
    low_high = encoder.scale.to_env(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert torch.allclose(low_high, torch.tensor([[-0.4, -0.45], [0.6, 0.05]]), atol=1e-6)

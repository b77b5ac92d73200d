"""Networks for pictures and instructions: what the prefix is, that it is computed once, and that replays agree."""

import importlib.util

import pytest
import torch
from zoo.vlms import build_vlm

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from pipelines.robot.demonstrations import demonstrations
from pipelines.robot.demonstrations import starts as all_starts
from pipelines.robot.envs import Observation, make_envs
from pipelines.robot.heads.base import HeadShape
from pipelines.robot.heads.tokens import TokenHead
from pipelines.robot.networks import Spaces
from pipelines.robot.policy import RobotPolicy
from pipelines.robot.vision import Backbone, ConvStem, Layer
from pipelines.robot.vla import SceneEncoder
from pipelines.robot.vla_lerobot import LeRobotEncoder
from pipelines.robot.vla_vlm import VLMEncoder
from pipelines.vlm.loading import LoadedVLM

SPACES = Spaces(2, (3, 32, 32), 2)
FROZEN = ("vision", "projector", "language")
FLOW = {"type": "flow", "num_steps": 4}
TOKENS = {"type": "tokens", "bins": 9}
ONE_BY_ONE = {**TOKENS, "decoding": "autoregressive"}


def starts(count):
    return all_starts("planar:reach", count)


def scene(**options):
    torch.manual_seed(0)
    return SceneEncoder(SPACES, width=16, **options)


def vlm(family="qwen2_5_vl", **options):
    return VLMEncoder(SPACES, LoadedVLM(*build_vlm(family)), **options)


def policy(network, head, envs=8, **options):
    torch.manual_seed(1)
    return RobotPolicy(network, "planar:reach", head, horizon=2, envs=envs, env_options={"max_steps": 4}, **options)


CASES = {
    "scene, parallel": (scene, TOKENS),
    "scene, one by one": (scene, ONE_BY_ONE),
    "scene, flow": (scene, FLOW),
    "scene, learned noise": (scene, {**FLOW, "learned_std": [0.05, 0.2]}),
    "scene, gaussian": (scene, {"type": "gaussian"}),
    "scene, pooled flow": (lambda: scene(pool=True), FLOW),
    "vlm, parallel": (lambda: vlm(actions="tokens"), TOKENS),
    "vlm, one by one": (lambda: vlm(actions="tokens"), ONE_BY_ONE),
    "vlm, flow expert": (vlm, FLOW),
    "vlm, token expert": (lambda: vlm(freeze=FROZEN), ONE_BY_ONE),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_replay_has_ratio_one(case):
    network, head = CASES[case]
    # A replay has more rows in a call than a turn of the rollout; several threads would cut the sums in other places.
    torch.set_num_threads(1)
    made = policy(network(), head, value_head=True)
    rollout = made.rollout(starts(2), 4, seed=0)
    found = made.decisions(rollout)
    assert torch.equal(found.logp, rollout.logp)
    assert torch.equal(found.value, rollout.value)
    found.logp.sum().backward()
    trained = {name.split(".")[0] for name, p in made.parameters.named.items() if p.grad is not None}
    assert trained >= ({"head"} if case == "vlm, token expert" else {"encoder", "head"})


@pytest.mark.parametrize("case", ["vlm, parallel", "vlm, one by one", "vlm, flow expert"])
def test_the_model_reads_each_turn_once_in_rollout_and_update(case):
    network, head = CASES[case]
    made = policy(network(), head)
    made._replayed = True
    counters = made.encoder.counters
    rollout = made.rollout(starts(5), 1, seed=0)
    turns = int(rollout.trace.count.sum())
    assert turns == 10
    assert counters["prefill_rows"] == counters["images_encoded"] == turns
    made.decisions(rollout)
    seen = rollout.trace.turns.observation
    distinct = {(text, image.numpy().tobytes()) for text, image in zip(seen.instruction, seen.image, strict=True)}
    assert counters["prefill_rows"] == turns + len(distinct)
    # The members of a group see the same at first.
    before = counters["prefill_rows"]
    made.rollout(starts(2), 4, seed=0)
    assert counters["prefill_rows"] <= before + 2 + 8


@pytest.mark.parametrize("causal", [True, False])
def test_action_tokens_go_on_as_in_a_plain_run_of_the_model(causal):
    encoder = vlm(actions="tokens")
    torch.manual_seed(2)
    head = TokenHead(HeadShape(encoder.context_dim, 2, 2, encoder), bins=9, decoding="autoregressive")
    seen = make_envs("planar:reach", 1).reset([3])
    tokens = torch.tensor([[4, 0, 8]])
    head.network.places.data.normal_()
    with torch.no_grad():
        prefix = encoder(seen)
        found = head.network(prefix, tokens if causal else None)
        model = encoder.model
        reader = encoder.reader
        text = encoder.prompt.format(instruction=seen.instruction[0])
        (read,) = reader.read([Prompt(text=text, images=(seen.image[0] / 255.0,))])
        media = read.media[0].tensors
        inner = model.base_model
        embedded = model.get_input_embeddings()(read.ids[None])
        features = torch.cat(inner.get_image_features(**media, return_dict=True).pooler_output)
        embedded[0, read.ids == model.config.image_token_id] = features
        said = model.get_input_embeddings()(tokens + head.network.first)
        new = torch.cat([head.network.places[:1][None], said], 1) if causal else head.network.places[None]
        length, more = len(read.ids), new.shape[1]
        mask = torch.ones(length + more, length + more, dtype=torch.bool).tril()
        if not causal:
            mask[length:] = True
        positions = torch.cat([read.positions, length + read.delta + torch.arange(more).expand(3, -1)], 1)
        output = inner.language_model(
            inputs_embeds=torch.cat([embedded, new], 1),
            attention_mask=mask[None, None],
            position_ids=positions[:, None],
        )
        expected = model.lm_head(output.last_hidden_state[:, length:])[..., -9:]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["smolvlm", "paligemma", "internvl", "qwen3_vl"])
def test_other_families_give_prefixes_too(family):
    for head, actions in ((FLOW, "expert"), (TOKENS, "tokens")):
        made = policy(vlm(family, actions=actions), head, envs=2)
        rollout = made.rollout(starts(1), 2, seed=0)
        assert torch.allclose(made.decisions(rollout).logp, rollout.logp, atol=1e-5)


def test_families_that_forget_tokens_are_refused():
    made = vlm("gemma3")
    with pytest.raises(UserError, match=r"Gemma3.* choose a family with full attention"):
        made(make_envs("planar:reach", 1).reset([0]))
    with pytest.raises(UserError, match=r"network.actions is 'tokens', which only the action head 'tokens' can take"):
        policy(vlm(actions="tokens"), FLOW)


def test_half_precision_and_adapters_work():
    from pipelines.vlm.training import VLMLoRA

    model, processor = build_vlm("qwen2_5_vl")
    loaded = LoadedVLM(model.to(torch.bfloat16), processor)
    for head, actions in ((FLOW, "expert"), (TOKENS, "tokens")):
        made = policy(VLMEncoder(SPACES, loaded, actions=actions), head, envs=2)
        rollout = made.rollout(starts(1), 2, seed=0)
        assert torch.isfinite(made.decisions(rollout).logp).all()
    made = policy(vlm(lora=VLMLoRA(rank=2)), FLOW, envs=2)
    names = [name for name in made.parameters.named if name.startswith("encoder.")]
    assert names
    assert all("lora_" in name for name in names)
    made.decisions(made.rollout(starts(1), 2, seed=0)).logp.sum().backward()
    assert any(made.parameters.named[name].grad.abs().sum() > 0 for name in names)


def test_a_picture_and_an_instruction_have_to_be_there():
    with pytest.raises(UserError, match=r"network 'scene' reads pictures, but the environment shows none"):
        SceneEncoder(Spaces(2, None, 2))
    with pytest.raises(UserError, match=r"network 'vlm' reads pictures, but the environment shows none"):
        VLMEncoder(Spaces(2, None, 2), "nowhere")
    with pytest.raises(UserError, match=r"gives none: set env_options.instruction"):
        vlm()(Observation(torch.zeros(1, 2), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))


def test_lerobot_is_asked_for_by_name():
    if importlib.util.find_spec("lerobot"):
        pytest.skip("LeRobot is installed")
    with pytest.raises(UserError, match=r"network 'lerobot' needs the package lerobot"):
        LeRobotEncoder(SPACES, "lerobot/smolvla_base")


def test_a_row_does_not_depend_on_its_batch():
    encoder = scene()
    seen = make_envs("planar:reach", 5).reset(range(5))
    with torch.no_grad():
        together, alone = encoder(seen), encoder(seen[[3]])
    assert torch.allclose(together[[3]].states, alone.states, atol=1e-6)
    assert torch.allclose(together.pooled()[3:4], alone.pooled(), atol=1e-6)


def test_the_instruction_picture_and_state_all_count():
    encoder = scene()
    seen = make_envs("planar:reach", 2).reset([0, 1])
    other = Observation(seen.state, seen.image, ["reach the red circle", "reach the blue one"])
    dark = Observation(seen.state, seen.image // 2, seen.instruction)
    base = encoder(seen).pooled()
    assert not torch.allclose(base, encoder(other).pooled())
    assert not torch.allclose(base, encoder(dark).pooled())
    assert torch.equal(base[:, -2:], seen.state)
    with pytest.raises(UserError, match=r"network.words has no 'grean' .did you mean 'green'"):
        encoder(Observation(seen.state, seen.image, ["reach the grean one"] * 2))
    with pytest.raises(UserError, match=r"has 9 words: network.max_words is 8"):
        encoder(Observation(seen.state, seen.image, ["a " * 9] * 2))
    unread = SceneEncoder(SPACES, width=16, max_words=0)
    assert torch.equal(unread(seen).pooled(), unread(other).pooled())


def test_a_layer_does_not_see_what_is_masked():
    torch.manual_seed(0)
    layer = Layer(8, 2, memory_width=6)
    tokens, memory = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool)
    mask[..., 1] = False
    changed = memory.clone()
    changed[:, 1] += 1
    assert torch.equal(layer(tokens, mask, memory), layer(tokens, mask, changed))
    assert not torch.allclose(layer(tokens, mask, memory), layer(tokens, mask, 2 * memory**3))


def test_pictures_of_any_size_have_a_stem():
    for shape in ((3, 8, 8), (3, 20, 36), (3, 64, 64)):
        stem = ConvStem(shape, 16)
        tokens = stem(torch.randint(256, (2, *shape), dtype=torch.uint8))
        assert tokens.shape == (2, -(-shape[1] // 8) * -(-shape[2] // 8), 16)


def test_backbones_of_transformers_read_pictures(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    encoder = SceneEncoder(SPACES, width=16, backbone=str(tmp_path))
    seen = make_envs("planar:reach", 2).reset([0, 1])
    assert encoder(seen).states.shape == (2, 2, 5 + 8, 16)
    image = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    expected = model(pixel_values=torch.ones(1, 3, 16, 16)).last_hidden_state
    assert torch.allclose(encoder.picture[0](image), expected, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.picture[0].parameters())
    assert all(p.requires_grad for p in Backbone(str(tmp_path), freeze=False).network.parameters())
    with pytest.raises(UserError, match="vision backbone '/nowhere' cannot be loaded"):
        Backbone("/nowhere")


def test_an_exported_policy_acts_the_same(tmp_path):
    network = {"type": "scene", "width": 16}
    made = policy(network, TOKENS)
    made.export(tmp_path)
    again = RobotPolicy(RobotPolicy.load(str(tmp_path)), "planar:reach", envs=8, env_options={"max_steps": 4})
    first, second = (one.generate(starts(3), [0, 1, 2]).episodes for one in (made, again))
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(first, second, strict=True))


def test_part_of_a_chunk_can_be_carried_out():
    made = policy(scene(), TOKENS, execute=1)
    rollout = made.rollout(starts(2), 1, seed=0)
    assert rollout.trace.count.tolist() == [4, 4]
    assert rollout.samples.episodes[0].actions.shape == (4, 1, 2)
    # Of two actions with two numbers the second one is no decision.
    assert rollout.mask[0].tolist() == [True, True, False, False] * 4
    assert torch.equal(made.decisions(rollout).logp, rollout.logp)
    with pytest.raises(UserError, match=r"pipeline.execute is 3, but a chunk has only 2 actions"):
        policy(scene(), TOKENS, execute=3)


@pytest.mark.parametrize("case", ["scene, one by one", "vlm, parallel", "vlm, flow expert"])
def test_a_few_steps_explain_a_few_demonstrations(case):
    network, head = CASES[case]
    made = policy(network(), head)
    shown = Samples(prompts=list(demonstrations("planar:reach", 2, 2))[:8])
    made.begin_stage(shown.prompts)
    optimiser = torch.optim.Adam(made.parameters, lr=5e-3)
    losses = []
    for _ in range(25):
        loss = made.fit(shown, range(8)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

"""A ControlNet trained by ControlNet++: the condition comes with the prompt, the UNet stays as it is."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from table_policy import TablePolicy, table_context, take_step
from zoo import ZOO

from mmrl import Prompt
from mmrl.components import algorithm_component, build_algorithm
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.scoring import Scorer
from mmrl.types import Samples
from pipelines import DiffusionPolicy
from rewards import load_reward

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain pipeline and a ControlNet for it, each in a folder of its own."""
    from diffusers import ControlNetModel

    base, control = (tmp_path_factory.mktemp("models") / name for name in ("base", "control"))
    pipe = ZOO["StableDiffusion"]().pipe
    pipe.save_pretrained(base)
    torch.manual_seed(0)
    ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).save_pretrained(control)
    return str(base), str(control)


def test_the_controlnet_learns_and_nothing_else_does(folders):
    base, control = folders
    pipe = DiffusionPolicy.load(base, controlnet=control)
    call = {**ZOO["StableDiffusion"]().call, "guidance_scale": 1.0}
    policy = DiffusionPolicy(pipe, num_steps=4, call=call, train=["controlnet"])
    assert all(name.startswith("controlnet.") for name in policy.parameters.named)
    side = policy.generate([Prompt("x", images=[Image.new("RGB", (16, 16))])], [1]).images.shape[-1]
    condition, target = Image.new("RGB", (side, side), "white"), torch.full((3, side, side), 0.5)
    prompts = [Prompt(f"picture {k}", id=str(k), images=[condition], target=target) for k in range(2)]
    context = table_context(TablePolicy())
    context.policy, context.prompts = policy, PromptSampler(prompts, 2, shuffle=False)
    context.scorer = Scorer([load_reward("pixels", measure="brightness")])
    algorithm = build_algorithm(
        algorithm_component({"type": "controlnet_pp", "begin": [0.5, 1.0]}, where="test", path="algorithm")
    )
    unet = torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])
    before = {name: p.detach().clone() for name, p in policy.parameters.named.items()}
    take_step(algorithm, context, lr=0.1)
    assert any(not torch.equal(before[name], p) for name, p in policy.parameters.named.items())
    assert torch.equal(unet, torch.cat([p.detach().flatten() for p in pipe.unet.parameters()]))
    assert context.tally.result()["fit"] > 0


def test_names_of_components_are_checked(folders):
    pipe = ZOO["StableDiffusion"]().pipe
    with pytest.raises(UserError, match=r"has no 'unte' .did you mean 'unet'"):
        DiffusionPolicy(pipe, train=["unte"])


def test_the_edges_of_a_picture_agree_with_their_own_map(tmp_path):
    from torchvision.transforms.functional import to_pil_image

    reward = load_reward(f"{CONFIGS / 'image/rewards/edges.py'}:agreement")
    picture = torch.ones(1, 3, 32, 32)
    picture[..., 8:24, 8:24] = 0.2
    grey = picture[:, :1]
    across, down = (grey.roll(-1, axis) - grey.roll(1, axis) for axis in (3, 2))
    own = to_pil_image((across.square() + down.square()).sqrt()[0].clamp(max=1))
    found = [
        reward(Samples([Prompt("x", images=[condition])], images=picture)).item()
        for condition in (own, Image.new("L", (32, 32)), own.rotate(45))
    ]
    assert found[0] > max(found[1:]) + 0.01
    picture.requires_grad_()
    reward(Samples([Prompt("x", images=[Image.new("L", (32, 32))])], images=picture)).sum().backward()
    assert picture.grad.abs().sum() > 0

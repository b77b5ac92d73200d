"""Tiny random CLIP models of the real classes, saved as folders that the real loaders read."""

import json
from pathlib import Path

import pytest
import torch
from reward_samples import SIZE, TEXTS, character_tokenizer, smooth_images

from mmrl.types import Prompt, Samples


@pytest.fixture
def samples() -> Samples:
    """Four pictures in two groups."""
    prompts = [Prompt(text, id=f"prompts.txt:{row + 1}") for row, text in enumerate(TEXTS)]
    return Samples(prompts, images=smooth_images(4, 24, 24), group=torch.tensor([0, 0, 1, 1]))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> str:
    """transformers: CLIPModel with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = character_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, initializer_factor=3.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory) -> str:
    """open_clip: a folder with its config and weights."""
    import open_clip

    folder: Path = tmp_path_factory.mktemp("tiny-open-clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny-open-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-open-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-open-clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)

"""The tiny models of the zoo are what they stand for: real classes that process, generate and survive a round trip."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from zoo.vlms import BUILDERS, build_vlm

FAMILIES = tuple(BUILDERS)


def inputs_of(processor) -> dict[str, torch.Tensor]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "where is the red circle?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    # Llama 4 prepares pictures in bfloat16.
    return {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_process_generate_and_reload(family, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = build_vlm(family)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 5e5
    assert not model.training
    inputs = inputs_of(processor)
    count = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, count:]
        negative = dict(inputs, pixel_values=-inputs["pixel_values"])
        assert (model(**negative).logits[:, -1] - logits[:, -1]).abs().max() > 1e-3
    assert 1 <= said.shape[1] <= 4
    assert isinstance(processor.batch_decode(said)[0], str)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert type(reader) is type(processor)
    loaded = inputs_of(reader)
    assert loaded.keys() == inputs.keys()
    assert all(torch.equal(loaded[key], inputs[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(again(**loaded).logits, logits)


def test_the_seed_decides_and_building_is_quick():
    began = time.process_time()
    built = {family: build_vlm(family, seed=3)[0].state_dict() for family in FAMILIES}
    assert time.process_time() - began < 20
    for family, state in built.items():
        same, other = build_vlm(family, seed=3)[0].state_dict(), build_vlm(family, seed=4)[0].state_dict()
        assert all(torch.equal(same[name], value) for name, value in state.items())
        assert not all(torch.equal(other[name], value) for name, value in state.items())

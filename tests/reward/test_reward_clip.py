"""CLIP-type rewards against the libraries they come from, on tiny random models."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_samples import SIZE, TEXTS, directional_check, sharp_images, smooth_images

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.encoders import load_encoder
from rewards.preprocess import from_open_clip, from_transformers

SHAPES = [(32, 32), (24, 24), (64, 64), (48, 80), (81, 47), (33, 50), (17, 90)]


def make_samples(images):
    return Samples([Prompt(TEXTS[i % 4]) for i in range(len(images))], images=images)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_preprocessing_equals_the_transformers_processor(clip_folder, height, width):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    preprocess = from_transformers(processor)
    images = smooth_images(2, height, width)
    # On floats the library does not round: equal to float32.
    expected = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(images), expected, atol=2e-6, rtol=0)
    # On pictures it rounds to eight bits after each axis: half a level twice, the first a little amplified.
    expected = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    assert (preprocess(images) - expected).abs().max() < 1.2 / 255 / 0.26
    # Where bicubic overshoots, it is cut off as in eight bits; only noise can overshoot along both axes.
    sharp = sharp_images(2, height, width)
    expected = processor([to_pil(image) for image in sharp], return_tensors="pt")["pixel_values"]
    assert (preprocess(sharp) - expected).abs().mean() < 0.5 / 255 / 0.26


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [32, (32, 20)])
def test_preprocessing_equals_open_clip(height, width, mode, size):
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size=size, resize_mode=mode, fill_color=40)
    transform, preprocess = image_transform_v2(config, is_train=False), from_open_clip(asdict(config))
    images = smooth_images(2, height, width)
    expected = torch.stack([transform(to_pil(image)) for image in images])
    # The imaging library resizes in fixed point, one axis after the other with eight bits in between.
    assert (preprocess(images) - expected).abs().max() < 1.6 / 255 / 0.26


def test_siglip_type_processor_squashes():
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    images = smooth_images(2, 48, 80)
    expected = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(from_transformers(processor)(images), expected, atol=2e-6, rtol=0)


def test_unsupported_processor_is_refused():
    from transformers import CLIPImageProcessor

    with pytest.raises(UserError, match="not supported for rewards"):
        from_transformers(CLIPImageProcessor(resample=Image.Resampling.NEAREST))
    with pytest.raises(UserError, match="does not resize"):
        from_transformers(CLIPImageProcessor(do_resize=False))


def transformers_logits(folder, images, texts):
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    inputs = AutoProcessor.from_pretrained(folder)(
        text=texts, images=[to_pil(image) for image in images], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal(), model.logit_scale.exp().item()


def test_clip_equals_transformers(clip_folder):
    # Already of the model's size, so that the library's rounding after the resize plays no part.
    images = sharp_images(4, SIZE, SIZE)
    logits, factor = transformers_logits(clip_folder, images, TEXTS)
    cosine = load_reward("clip", model=clip_folder)(make_samples(images))
    assert cosine.shape == (4,)
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine * factor, logits, atol=2e-5, rtol=1e-5)
    assert cosine.std() > 1e-3, "a model that sees nothing would prove nothing"
    scored = load_reward("clip", model=clip_folder, output="logit")(make_samples(images))
    torch.testing.assert_close(scored, logits, atol=2e-5, rtol=1e-5)
    picked = load_reward("pickscore", model=clip_folder, processor=None)(make_samples(images))
    torch.testing.assert_close(picked, logits, atol=2e-5, rtol=1e-5)


def test_clip_equals_open_clip(open_clip_folder):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    images = sharp_images(4, SIZE, SIZE)
    with torch.no_grad():
        vision, text, factor = model.eval()(
            torch.stack([transform(to_pil(image)) for image in images]), tokenizer(TEXTS)
        )
    expected = (vision @ text.T).diagonal()
    samples = make_samples(images)
    by_folder = load_reward("clip", model=open_clip_folder, backend="open_clip")(samples)
    torch.testing.assert_close(by_folder, expected, atol=1e-6, rtol=1e-5)
    # The same network as an architecture known by name and a file of weights.
    weights = str(Path(open_clip_folder) / "open_clip_pytorch_model.bin")
    by_name = load_reward("clip", model="tiny-open-clip", backend="open_clip", checkpoint=weights, output="logit")
    torch.testing.assert_close(by_name(samples), expected * factor, atol=2e-5, rtol=1e-5)
    preference = load_reward("hpsv2", model="tiny-open-clip", checkpoint=weights)
    torch.testing.assert_close(preference(samples), expected, atol=1e-6, rtol=1e-5)
    assert preference.encoder.preprocess.resize == "longest"


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_gradient_of_clip(backend, clip_folder, open_clip_folder):
    folder = clip_folder if backend == "transformers" else open_clip_folder
    reward = load_reward("clip", model=folder, backend=backend, output="logit", batch_size=2)
    assert reward.differentiable
    directional_check(lambda images: reward(make_samples(images)), smooth_images(3, 24, 40))
    assert all(p.grad is None for p in reward.encoder.model.parameters())


def test_batch_size_does_not_matter(clip_folder):
    samples = make_samples(smooth_images(5, 24, 24))
    scores = [load_reward("clip", model=clip_folder, batch_size=size)(samples) for size in (1, 2, 32)]
    torch.testing.assert_close(scores[0], scores[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores[1], scores[2], atol=1e-6, rtol=0)


def test_each_text_is_encoded_once_and_models_are_shared(clip_folder):
    reward = load_reward("clip", model=clip_folder, device="cpu")
    other = load_reward("pickscore", model=clip_folder, processor=None, device="cpu")
    assert reward.encoder is other.encoder
    samples = make_samples(smooth_images(8, 24, 24))
    first = reward(samples)
    assert reward.encoder.encoded == 4
    other(samples)
    assert torch.equal(reward(samples), first)
    assert reward.encoder.encoded == 4


def test_shared_model_goes_when_no_reward_uses_it(clip_folder):
    import gc
    import weakref

    reward = load_reward("clip", model=clip_folder, dtype="float16")
    gone = weakref.ref(reward.encoder)
    del reward
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_bfloat16(backend, clip_folder, open_clip_folder):
    folder = clip_folder if backend == "transformers" else open_clip_folder
    samples = make_samples(smooth_images(4, SIZE, SIZE))
    full = load_reward("clip", model=folder, backend=backend)(samples)
    half = load_reward("clip", model=folder, backend=backend, dtype="bfloat16")
    assert next(half.encoder.model.parameters()).dtype == torch.bfloat16
    scores = half(samples)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full, atol=0.03, rtol=0)


def test_long_prompts_are_cut(clip_folder, open_clip_folder):
    samples = Samples([Prompt("very " * 200)], images=smooth_images(1, SIZE, SIZE))
    assert load_reward("clip", model=clip_folder)(samples).isfinite().all()
    assert load_reward("clip", model=open_clip_folder, backend="open_clip")(samples).isfinite().all()


def laion_layers():
    """The layout of LAION's second predictor, for embeddings of 12 numbers."""
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            *(nn.Linear(12, 10), nn.Dropout(0.2), nn.Linear(10, 8), nn.Dropout(0.2), nn.Linear(8, 6)),
            *(nn.Dropout(0.1), nn.Linear(6, 4), nn.Linear(4, 1)),
        ).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_head_on_unit_embeddings(clip_folder, tmp_path, suffix):
    from safetensors.torch import save_file
    from transformers import AutoProcessor, CLIPModel

    layers, path = laion_layers(), str(tmp_path / f"head{suffix}")
    state = {f"layers.{key}": value for key, value in layers.state_dict().items()}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    images = sharp_images(3, SIZE, SIZE)
    pixels = AutoProcessor.from_pretrained(clip_folder)(images=[to_pil(i) for i in images], return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(**pixels).pooler_output
        expected = layers(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    reward = load_reward("aesthetic", model=clip_folder, head=path)
    torch.testing.assert_close(reward(make_samples(images)), expected, atol=1e-5, rtol=1e-5)
    directional_check(lambda images: reward(make_samples(images)), smooth_images(3, 40, 24))


def test_aesthetic_errors(clip_folder, tmp_path):
    wrong, text, wide = tmp_path / "wrong.pth", tmp_path / "text.pth", tmp_path / "wide.pth"
    torch.save({"encoder.weight": torch.zeros(2, 2)}, wrong)
    text.write_text("hello")
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, wide)
    with pytest.raises(UserError, match=r"head is 'nowhere\.pth': there is no such file"):
        load_reward("aesthetic", model=clip_folder, head="nowhere.pth")
    with pytest.raises(UserError, match="not a head of LAION's layout"):
        load_reward("aesthetic", model=clip_folder, head=str(wrong))
    with pytest.raises(UserError, match="not a file of weights"):
        load_reward("aesthetic", model=clip_folder, head=str(text))
    with pytest.raises(UserError, match="takes embeddings of 768 numbers"):
        load_reward("aesthetic", model=clip_folder, head=str(wide))(make_samples(smooth_images(1, 32, 32)))


def test_pickled_code_is_not_run(clip_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not a file of weights"):
        load_reward("aesthetic", model=clip_folder, head=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()


def test_model_errors_are_one_sentence(clip_folder, tmp_path, open_clip_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ({"model": str(empty)}, "could not be loaded by transformers"),
        ({"model": str(empty), "backend": "open_clip"}, "could not be loaded by open_clip"),
        ({"model": "ViT-B-33", "backend": "open_clip"}, "could not be loaded by open_clip"),
        ({"model": "ViT-B-32", "backend": "open_clip"}, "checkpoints: openai"),
        ({"model": "ViT-B-32", "backend": "open_clip", "checkpoint": "nowhere.pt"}, "there is no such file"),
        ({"model": clip_folder, "checkpoint": "x.pt"}, "backend=open_clip only"),
        ({"model": open_clip_folder, "backend": "open_clip", "processor": "x"}, "bring their own"),
        ({"model": clip_folder, "backend": "openclip"}, "did you mean 'open_clip'"),
        ({"model": clip_folder, "batch_size": 0}, "greater than 0"),
    ]
    for options, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            load_reward("clip", **options)
        assert "\n" not in str(caught.value)
    misfit = tmp_path / "misfit.pt"
    torch.save({"positional_embedding": torch.zeros(48, 3)}, misfit)
    with pytest.raises(UserError, match="could not be loaded by open_clip"):
        load_reward("clip", model="tiny-open-clip", backend="open_clip", checkpoint=str(misfit))


def test_needs_images(clip_folder):
    with pytest.raises(UserError, match="reward 'clip' scores images, but the samples have none"):
        load_reward("clip", model=clip_folder)(Samples([Prompt("a")], texts=["b"]))


def test_logit_scale_is_not_its_logarithm(clip_folder):
    assert load_encoder(clip_folder).logit_scale == pytest.approx(math.exp(2.6592), rel=1e-4)

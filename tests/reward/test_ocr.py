"""Text reward: the score by hand, and tiny random readers of the real classes."""

import pytest
import torch
from reward_samples import SIZE, character_tokenizer, smooth_images

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.seeding import generator
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.ocr import text_score, wanted_text
from rewards.text_overlap import edit_distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("Open Late", "Open Late", 1.0),
        ("OPEN\nlate", "Open Late", 1.0),
        ("now open late!", "Open Late", 1.0),  # part of what was read
        ("open lat", "Open Late", 7 / 8),
        ("oxen late", "Open Late", 7 / 8),
        ("", "Open Late", 0.0),
        ("something else altogether", "Open", 0.0),  # never below 0
    ],
)
def test_text_score(read, wanted, score):
    assert text_score(read, wanted) == pytest.approx(score)


def test_wanted_text():
    assert wanted_text(Prompt('a sign "A b" and "C"'), "here") == "A b"
    assert wanted_text(Prompt("a sign “A b”"), "here") == "A b"
    assert wanted_text(Prompt('a sign "A b"', target="C d"), "here") == "C d"
    for prompt in (Prompt("a sign"), Prompt('a sign " "'), Prompt("a sign", target=" "), Prompt("", target={"a": 1})):
        with pytest.raises(UserError, match=r"here has .*text to show"):
            wanted_text(prompt, "here")


def make_samples(*targets, size=40):
    prompts = [Prompt("a sign", id=f"words.jsonl:{row + 1}", target=target) for row, target in enumerate(targets)]
    return Samples(prompts, images=smooth_images(len(targets), size, size))


@pytest.fixture(scope="module")
def trocr(tmp_path_factory) -> str:
    """A reader that always sees the letter a."""
    from transformers import (
        TrOCRConfig,
        TrOCRForCausalLM,
        TrOCRProcessor,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    tokenizer = character_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        cross_attention_hidden_size=16,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        add_cross_attention=True,
        is_decoder=True,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionEncoderDecoderModel(
            encoder=ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **shape), add_pooling_layer=False),
            decoder=TrOCRForCausalLM(decoder),
        )
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        # The last layer norm gives one vector whatever is seen, and only one letter's row agrees with it.
        norm = model.decoder.model.decoder.layers[-1].final_layer_norm
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        model.decoder.output_projection.weight.zero_()
        model.decoder.output_projection.weight[tokenizer.convert_tokens_to_ids("a")] = 1.0
    folder = tmp_path_factory.mktemp("trocr")
    model.save_pretrained(folder)
    TrOCRProcessor(ViTImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def got(tmp_path_factory) -> str:
    """GOT-OCR with the tokens its processor writes."""
    from tokenizers import pre_tokenizers
    from transformers import (
        GotOcr2Config,
        GotOcr2ForConditionalGeneration,
        GotOcr2ImageProcessor,
        GotOcr2Processor,
        Qwen2Tokenizer,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], pad_token="<|endoftext|>", eos_token="<|endoftext|>", extra_special_tokens=special[1:]
    )
    config = GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 256,
            "patch_size": 4,
            "mlp_dim": 16,
            "window_size": 8,
            "global_attn_indexes": [],
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<imgpad>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GotOcr2ForConditionalGeneration(config)
    with torch.no_grad():
        # It says some letters and then that it has finished.
        words = tokenizer.convert_tokens_to_ids([*"abcdefghijklmn", "<|im_end|>", *"pqrstuvwxyzo"])
        rows = torch.randn(len(words), 16, generator=generator(1, "rows"))
        model.lm_head.weight.zero_()
        model.lm_head.weight[words] = rows
        model.model.language_model.embed_tokens.weight.normal_(generator=generator(1, "embeddings"))
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "lm_head" not in name and "embed_tokens" not in name:
                weight.mul_(10)
    folder = tmp_path_factory.mktemp("got")
    model.save_pretrained(folder)
    GotOcr2Processor(GotOcr2ImageProcessor(size={"height": 256, "width": 256}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory) -> str:
    """A model that chats: it needs a question and a template."""
    from zoo.text import qwen_vl_processor, qwen_vl_text

    tokenizer, model = qwen_vl_text()
    processor = qwen_vl_processor(tokenizer)
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant"
    )
    folder = tmp_path_factory.mktemp("qwen_vl")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_reward_with_an_encoder_and_a_decoder(trocr):
    reward = load_reward("ocr", model=trocr, max_new_tokens=4, batch_size=2)
    scores = reward(make_samples("AAAA", "a A", "aaaab", "bbbb", "aaab"))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1, 1, 0.8, 0, 0.75])
    assert not reward.differentiable


def test_got_reads_what_its_page_says(got):
    """The documented way, one picture at a time, against batches of two."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(got), AutoProcessor.from_pretrained(got)
    samples = make_samples("x", "y", "z")
    texts = []
    for image in samples.images:
        inputs = processor(to_pil(image), return_tensors="pt")
        tokens = model.generate(
            **inputs, do_sample=False, tokenizer=processor.tokenizer, stop_strings="<|im_end|>", max_new_tokens=40
        )
        texts.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    reward = load_reward("ocr", model=got, max_new_tokens=40, batch_size=2)
    assert reward.read(samples.images) == texts
    # The end of a turn, which the generation config does not name, has ended one.
    assert all(0 < len(text) < 40 for text in texts)
    assert reward(make_samples(*texts)).tolist() == [1, 1, 1]


def test_a_model_that_chats_is_asked(qwen_vl):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    samples = make_samples("x", "y", size=56)
    model, processor = AutoModelForImageTextToText.from_pretrained(qwen_vl), AutoProcessor.from_pretrained(qwen_vl)
    question = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>read<|im_end|>\n<|im_start|>assistant"
    texts = []
    for image in samples.images:
        inputs = processor(text=[question], images=[to_pil(image)], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=[0, 2])
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    reward = load_reward("ocr", model=qwen_vl, prompt="read", max_new_tokens=5)
    assert reward.read(samples.images) == texts
    with pytest.raises(UserError, match=r"cannot take a picture without a prompt, give it one \(prompt: ...\)"):
        load_reward("ocr", model=qwen_vl)


def test_own_readers(tmp_path):
    path = tmp_path / "readers.py"
    path.write_text(
        "def sizes(pictures):\n    return [f'{p.width} x {p.height}' for p in pictures]\n\n"
        "class Counter:\n"
        "    def __init__(self):\n        self.calls = 0\n"
        "    def __call__(self, pictures):\n        self.calls += 1\n"
        "        return [str(self.calls)] * len(pictures)\n\n"
        "def short(pictures):\n    return ['one']\n\n"
        "def numbers(pictures):\n    return [1, 2]\n\n"
        "other = 3\n"
    )
    assert load_reward("ocr", reader=f"{path}:sizes")(make_samples("40x40", "4")).tolist() == [1, 1]
    counter = load_reward("ocr", reader=f"{path}:Counter")
    assert counter(make_samples("1", "2")).tolist() == [1, 0]
    assert counter(make_samples("1", "2")).tolist() == [0, 1]
    for name, said in (("short", "returned 1 texts for 2 pictures"), ("numbers", "returned int, not text")):
        with pytest.raises(UserError, match=said):
            load_reward("ocr", reader=f"{path}:{name}")(make_samples("a", "b"))
    with pytest.raises(UserError, match="is int, not a function or class"):
        load_reward("ocr", reader=f"{path}:other")
    with pytest.raises(UserError, match="did you mean 'sizes'"):
        load_reward("ocr", reader=f"{path}:size")


def test_bad_input_names_the_sample(trocr, clip_folder, tmp_path):
    reward = load_reward("ocr", model=trocr, max_new_tokens=2)
    with pytest.raises(UserError, match=r"reward 'ocr': sample 1 \(prompt 'words.jsonl:2'.*no target"):
        reward(make_samples("a", None))
    with pytest.raises(UserError, match="scores images"):
        reward(Samples([Prompt(target="a")], texts=["a"]))
    for model in (clip_folder, str(tmp_path)):
        with pytest.raises(UserError, match="could not be loaded by transformers as a model from picture to text"):
            load_reward("ocr", model=model)

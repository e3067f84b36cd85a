"""Every YAML file in configs/ is valid and consistent with the others; mistakes are refused in one sentence."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from benchmarks.configs import benchmark_class
from experiments.commands import CONFIGS as CLASSES
from experiments.study.config import StudyConfig
from llm2.common.config_file import as_dict, load_config, read_values, write_config
from llm2.config import EvaluateConfig, ExploreConfig, ServeConfig, TrainConfig
from llm2.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
STUDIES = CONFIGS.parent / "experiments" / "studies"
COMMAND_FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate")
COMMAND_FILES += sorted(STUDIES.glob("*.yaml"))
ACCELERATE_FILES = sorted((CONFIGS / "accelerate").glob("*.yaml"))
GSM8K_MODELS = ["llama-3.1-8b-instruct", "llama-3.2-1b-instruct", "llama-3.2-3b-instruct", "qwen2.5-1.5b-instruct"]


def name(path):
    return f"{path.parent.name}/{path.name}"


def config_class(path):
    """The class that a file's name says: train.yaml and train_small.yaml are a TrainConfig."""
    if path.parent.name == "benchmark":
        return benchmark_class(path)
    if path.parent.name == "studies":
        return StudyConfig
    return CLASSES[path.stem.replace("-", "_").split("_")[0]]


@pytest.mark.parametrize("path", COMMAND_FILES, ids=name)
def test_every_config_loads_as_what_its_name_says(path):
    load_config(config_class(path), path)


@pytest.mark.parametrize("path", COMMAND_FILES, ids=name)
def test_no_config_repeats_a_default(path):
    cls = config_class(path)
    config = load_config(cls, path)
    defaults = {key: field.default for key, field in cls.__dataclass_fields__.items()}
    assert [key for key in yaml.safe_load(path.read_text()) if getattr(config, key) == defaults[key]] == []


@pytest.mark.parametrize("path", COMMAND_FILES + ACCELERATE_FILES, ids=name)
def test_every_config_opens_with_a_comment(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("model", GSM8K_MODELS)
def test_each_step_reads_what_the_one_before_it_writes(model):
    explore = load_config(ExploreConfig, CONFIGS / model / "explore.yaml")
    train = load_config(TrainConfig, CONFIGS / model / "train.yaml")
    evaluate = load_config(EvaluateConfig, CONFIGS / model / "evaluate.yaml")
    if (CONFIGS / model / "serve.yaml").exists():
        serve = load_config(ServeConfig, CONFIGS / model / "serve.yaml")
        assert (serve.model, serve.verifier) == (evaluate.model, evaluate.verifier)
        assert serve.chat_template == evaluate.chat_template
    assert train.train_file == explore.output == f"results/{model}/triplets.jsonl"
    assert evaluate.verifier == train.output_dir == f"results/{model}/verifier"
    assert evaluate.output_dir == f"results/{model}/gsm8k"
    assert explore.model == train.model == evaluate.model
    assert explore.chat_template == train.chat_template == evaluate.chat_template is not None
    assert (explore.split, evaluate.split) == ("train", "test")
    assert explore.device == train.device == evaluate.device == "cuda"


@pytest.mark.parametrize("model", GSM8K_MODELS)
def test_the_published_hyperparameters_are_the_ones_in_use(model):
    train = load_config(TrainConfig, CONFIGS / model / "train.yaml")
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio, train.num_train_epochs) == (
        2e-5,
        "cosine",
        0.1,
        2,
    )
    assert (train.global_batch_size, train.max_length, train.bf16) == (128, 2048, True)
    assert all(train.global_batch_size % (train.per_device_train_batch_size * gpus) == 0 for gpus in (1, 2, 4, 8))
    evaluate = load_config(EvaluateConfig, CONFIGS / model / "evaluate.yaml")
    assert (evaluate.alpha, evaluate.beta, evaluate.max_new_tokens, evaluate.num_samples) == (0.1, 0.25, 512, 20)


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=name)
def test_accelerate_accepts_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    assert config.num_processes == -1  # accelerate's sign for "the launcher must say"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_to_the_trainer_what_the_train_config_says(stage):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"zero{stage}.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED
    assert config.mixed_precision == "bf16"
    assert config.deepspeed_config["zero_stage"] == stage
    assert config.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert config.deepspeed_config["gradient_clipping"] == "auto"


TRAIN = "model: m\ntrain_file: t.jsonl\noutput_dir: o\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return path

    return to_file


def refusal(path, *overrides, cls=TrainConfig):
    with pytest.raises(UserError) as caught:
        load_config(cls, path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_key_is_refused_with_file_line_and_key(write):
    path = write(TRAIN + "learning_rte: 1e-3\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 4: unknown key 'learning_rte'")
    assert "learning_rate" in message


def test_a_missing_key_is_refused_by_name(write):
    path = write("model: m\noutput_dir: o\n")
    assert refusal(path).startswith(f"{path}: the key 'train_file' is missing")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("num_train_epochs: two", "'two'"),
        ("global_batch_size: 12.5", "12.5"),
        ("bf16: 1", "1"),
        ("model: 5", "5"),
        ("seed: null", "None"),
        ("device: tpu", "'tpu'"),
    ],
)
def test_an_ill_typed_value_is_refused_with_line_key_and_value(line, found, write):
    key = line.split(":")[0]
    text = TRAIN.replace("model: m\n", "") if key == "model" else TRAIN
    number = text.count("\n") + 1
    path = write(text + line + "\n")
    assert refusal(path).startswith(f"{path}, line {number}: key {key!r}: found {found}, expected: ")


@pytest.mark.parametrize(
    "line", ["warmup_ratio: 1.5", "eval_share: -0.1", "num_train_epochs: 0", "global_batch_size: 0"]
)
def test_a_value_out_of_bounds_is_refused(line, write):
    key, value = line.split(": ")
    assert f"line 4: key {key!r}: found {value}" in refusal(write(TRAIN + line + "\n"))


def test_an_override_wins_over_the_file_and_is_validated_like_it(write):
    path = write(TRAIN + "num_train_epochs: 3\n")
    config = load_config(TrainConfig, path, ["num_train_epochs=1.5", "eval_file=held out.jsonl", "bf16=true"])
    assert (config.num_train_epochs, config.eval_file, config.bf16) == (1.5, "held out.jsonl", True)
    assert "override 'num_train_epochs=many': key 'num_train_epochs': found 'many'" in refusal(
        path, "num_train_epochs=many"
    )
    assert "override 'epoch=1': unknown key 'epoch'" in refusal(path, "epoch=1")


def test_whole_numbers_are_decimal(write):
    for text, number in {"010": 10, "1_000": 1000, "0x10": 16}.items():
        assert load_config(TrainConfig, write(TRAIN), [f"seed={text}"]).seed == number
    for text in ("1:30", "1:30.5"):
        assert f"key 'seed': found '{text}'" in refusal(write(TRAIN), f"seed={text}")


@pytest.mark.parametrize("value", [r"#### \d+", "runs/a #2", "[1, 2] # two"])
def test_an_override_that_yaml_would_cut_at_a_comment_is_refused(value, write):
    assert "holds a comment; put the value into quotes within quotes" in refusal(write(TRAIN), f"output_dir={value}")
    assert load_config(TrainConfig, write(TRAIN), ["output_dir='runs/a #2'"]).output_dir == "runs/a #2"
    assert load_config(TrainConfig, write(TRAIN), ["output_dir=runs/a#2"]).output_dir == "runs/a#2"


@pytest.mark.parametrize("override", ["num_train_epochs", "=3", "num_train_epochs=[1"])
def test_an_override_without_key_or_equals_sign_is_refused(override, write):
    assert repr(override) in refusal(write(TRAIN), override)


@pytest.mark.parametrize("text", ["2e-5", "2.0e-05", "0.00002", "2E-5"])
def test_scientific_notation_is_a_number(text, write):
    assert load_config(TrainConfig, write(TRAIN + f"learning_rate: {text}\n")).learning_rate == 2e-5
    assert load_config(TrainConfig, write(TRAIN), [f"learning_rate={text}"]).learning_rate == 2e-5


@pytest.mark.parametrize(("text", "found"), [("- model\n- train\n", "list"), ("just words\n", "str")])
def test_a_file_that_is_no_mapping_is_refused(text, found, write):
    path = write(text)
    assert refusal(path) == f"{path}: expected `key: value` lines, found a {found}"


def test_a_file_that_is_no_yaml_is_refused_with_its_line(write):
    path = write("model: m\ntrain_file: [a\n")
    assert refusal(path).startswith(f"{path}, line ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert (
        refusal(tmp_path / "none.yaml") == f"cannot read the config {tmp_path / 'none.yaml'}: No such file or directory"
    )
    assert refusal(tmp_path).startswith(f"cannot read the config {tmp_path}")


def test_an_empty_file_lacks_the_first_required_key(write):
    assert "'model' is missing" in refusal(write(""))


def test_a_resolved_config_reads_back_as_itself(write, tmp_path):
    config = load_config(EvaluateConfig, write("model: m\noutput_dir: o\ntask: gsm8k\nmajority_at: [1, 4]\n"))
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(EvaluateConfig, tmp_path / "resolved.yaml") == config
    assert as_dict(config)["majority_at"] == [1, 4]


def test_a_key_that_cannot_be_printed_is_refused(tmp_path):
    (tmp_path / "odd.yaml").write_text('"\\ud800": 1')
    with pytest.raises(UserError, match=r"override '.ud800=': found the key '.ud800', expected a name"):
        load_config(EvaluateConfig, None, ["\ud800="])
    with pytest.raises(UserError, match=r"odd\.yaml"):
        load_config(EvaluateConfig, tmp_path / "odd.yaml")


def test_json_is_read_as_yaml_with_every_character(tmp_path):
    values = {"text": '\U0001f642 \u2028 \x85 \ud800 "\\ \n', "\U0001f642": [1, 1e-05, None, True, "\U0001f642"]}
    (tmp_path / "values.json").write_text(json.dumps(values))
    assert read_values(tmp_path / "values.json") == values

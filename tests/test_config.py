"""Loading configs: what is accepted, what comes out, and the one sentence for everything that is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from mmrl.components import build_algorithm, build_policy, build_scorer, component_model, term_model
from mmrl.config import DataOptions, EvalOptions, TrainerOptions, load_config, parse_config
from mmrl.errors import UserError
from mmrl.options import options_model, validate, values
from mmrl.overrides import apply_override, merge, parse_override, parse_yaml
from mmrl.registry import ALGORITHMS, PIPELINES, entries, resolve

BASE = """
pipeline: {type: diffusion, model: some/model, num_steps: 6}
data: {prompts: [a red circle, a blue square]}
rewards: [jpeg, {type: clip, weight: 2, model: some/clip}]
algorithm: {type: grpo, group_size: 4}
trainer: {steps: 5, lr: 1e-4}
"""


def write(folder: Path, text: str = BASE, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_defaults_and_overrides(tmp_path):
    config = load_config(write(tmp_path), ["trainer.lr=3e-4", "rewards.0.weight=0.5", "pipeline.call.height=64"])
    stage = config.stages[0]
    assert (config.run_dir, config.seed, stage.name) == ("runs/run", 0, "train")
    assert (stage.trainer.lr, stage.trainer.steps, stage.trainer.optimizer) == (3e-4, 5, "AdamW")
    assert [r.shared["weight"] for r in stage.rewards] == [0.5, 2.0]
    assert [r.shared["name"] for r in stage.rewards] == ["jpeg", "clip"]
    assert config.pipeline.options["call"] == {"height": 64}
    assert stage.algorithm.options["clip_range"] == 1e-4
    assert stage.eval_rewards == stage.rewards


def test_a_whole_list_can_be_given_on_the_command_line(tmp_path):
    config = load_config(write(tmp_path), ["rewards=[{type: pixels, measure: sharpness}]"])
    assert [r.type for r in config.stages[0].rewards] == ["pixels"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stages=[{name: warm, algorithm: sft}, {trainer: {lr: 0.5, ema: {decay: 0.5}}, rewards: [jpeg]}]"],
        ["eval.rewards=[{type: shapes, mode: strict}]", "trainer.mixed_precision=no", "rewards.0.clip=[-9, 1]"],
    ],
)
def test_dump_and_reload_are_equal(tmp_path, overrides):
    config = load_config(write(tmp_path), overrides)
    (tmp_path / "elsewhere").mkdir()
    config.save(tmp_path / "elsewhere" / "config.yaml")
    again = load_config(tmp_path / "elsewhere" / "config.yaml")
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_stages_lie_over_the_top_level(tmp_path):
    text = BASE + "stages:\n- {name: warm, algorithm: sft, trainer: {steps: 2}}\n- {algorithm: {group_size: 8}}\n"
    first, second = load_config(write(tmp_path, text)).stages
    assert (first.name, first.algorithm.type, first.trainer.steps, first.trainer.lr) == ("warm", "sft", 2, 1e-4)
    # Options of another type of algorithm do not carry over, those of the same do.
    assert "group_size" not in first.algorithm.options
    assert (second.name, second.algorithm.type, second.algorithm.options["group_size"]) == ("stage2", "grpo", 8)
    assert second.trainer.steps == 5


def test_paths_are_found_beside_the_config_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, working = tmp_path / "beside", tmp_path / "working"
    for folder in (beside, working):
        (folder / "models" / "tiny").mkdir(parents=True)
        (folder / "models" / "tiny" / "model_index.json").write_text("{}")
    (beside / "p.txt").write_text("a cat")
    (working / "q.txt").write_text("a dog")
    monkeypatch.chdir(working)
    text = BASE.replace("[a red circle, a blue square]", "p.txt, eval_prompts: q.txt")
    config = load_config(write(beside, text), ["pipeline.model=models/tiny"])
    assert config.stages[0].data.prompts == str(beside / "p.txt")
    assert config.stages[0].data.eval_prompts == str(working / "q.txt")
    assert config.pipeline.options["model"] == str(beside / "models" / "tiny")
    assert load_config(write(beside)).pipeline.options["model"] == "some/model"


def test_reward_from_a_file_beside_the_config(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(samples, limit: int = 3):\n    return [float(len(p.text) < limit) for p in samples.prompts]\n"
    )
    reward = load_config(write(tmp_path), ["rewards=[{type: mine.py:short, limit: 5}]"]).stages[0].rewards[0]
    assert (reward.type, reward.shared["name"]) == (f"{tmp_path / 'mine.py'}:short", "short")
    assert build_scorer([reward]).terms["short"].reward.options == {"limit": 5}
    assert "'rewards.0.limit' is 'x', but should be a whole number" in refused(
        tmp_path / "run.yaml", "rewards=[{type: mine.py:short, limit: x}]"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stps=3", "unknown key 'trainer.stps' (did you mean 'steps'?)"),
        ("trainerr.lr=3", "unknown key 'trainerr' (did you mean 'trainer'?)"),
        ("trainer.ema.decy=1", "unknown key 'trainer.ema.decy' (did you mean 'decay'?)"),
        ("algorithm.clip_rnage=3", "unknown key 'algorithm.clip_rnage' (did you mean 'clip_range'?)"),
        ("pipeline.nois_level=3", "unknown key 'pipeline.nois_level' (did you mean 'noise_level'?)"),
        ("pipeline.lora.rnk=3", "unknown key 'pipeline.lora.rnk' (did you mean 'rank'?)"),
        ("rewards.1.wieght=3", "unknown key 'rewards.1.wieght' (did you mean 'weight'?)"),
        ("rewards.1.weight={strat: 3}", "unknown key 'rewards.1.weight.strat' (did you mean 'start'?)"),
        ("eval.sede=3", "unknown key 'eval.sede' (did you mean 'seed'?)"),
        ("trainer.lr=fast", "'trainer.lr' is 'fast', but should be a number"),
        ("trainer.lr=-1", "'trainer.lr' is -1, but should be greater than 0"),
        ("trainer.steps=1.5", "'trainer.steps' is 1.5, but should be a whole number"),
        ("trainer.steps=true", "'trainer.steps' is true, but should be a number"),
        ("trainer.compile=maybe", "'trainer.compile' is 'maybe', but should be true or false"),
        ("trainer.mixed_precision=bf61", "should be 'no', 'bf16' or 'fp16' (did you mean 'bf16'?)"),
        ("trainer=3", "'trainer' should hold 'key: value' pairs, but is 3"),
        ("data.prompts=3", "'data.prompts' is 3, but should be text or a list"),
        ("rewards.1.weight=[a]", "'rewards.1.weight' is a list, but should be a number or a mapping"),
        ("rewards=[{type: clpi}]", "'rewards.0.type': there is no reward 'clpi' (did you mean 'clip'?)"),
        ("rewards=[{weight: 1}]", "'rewards.0.type' is missing"),
        ("rewards=clip", "'rewards' is 'clip', but should be a list of rewards"),
        ("rewards=[jpeg, jpeg]", "'rewards.1' is called 'jpeg' like an earlier reward"),
        ("rewards=[]", "'rewards' is empty, but algorithm 'grpo' needs at least one"),
        ("rewards=[nowhere.py:f]", "there is no file"),
        ("rewards=[no_such_module_x:f]", "there is no module 'no_such_module_x'"),
        ("rewards=[json:laods]", "'json' has nothing called 'laods' (did you mean 'loads'?)"),
        ("algorithm.type=grop", "'algorithm.type': there is no algorithm 'grop' (did you mean 'grpo'?)"),
        ("pipeline.type=difusion", "there is no pipeline 'difusion' (did you mean 'diffusion'?)"),
        ("algorithm.group_size=1", "algorithm.group_size is 1"),
        ("algorithm={type: dpo, group_size: 1}", "'algorithm.group_size' is 1, but should be greater than or equal"),
        ("algorithm=reward_backprop", "gradients, which do not flow through reward 'jpeg'"),
        ("pipeline.window=[9]", "window [9] has step 9"),
        ("pipeline.window={first: 40}", "asks for 40 steps"),
        ("seed=-1", "'seed' is -1"),
        ("pipeline=null", f"'pipeline.type' is missing (choices: {', '.join(PIPELINES)})"),
        ("stages=[]", "'stages' is a list, but should be a list of at least one stage"),
        ("stages=[3]", "'stages.0' is 3, but should be a mapping"),
        ("stages=[{nam: a}]", "unknown key 'stages.0.nam' (did you mean 'name'?)"),
        ("stages=[{trainer: {lr: x}}]", "stage 'stage1': 'trainer.lr' is 'x'"),
        ("stages=[{name: a}, {name: a}]", "'stages.1.name' is 'a', but should be text and not repeat"),
        ("rewards.2.weight=1", "'2' is not an index into 'rewards', which has 2 items"),
        ("rewards.0.weight.x", "should have the form key=value"),
        ("trainer.lr.x=1", "'trainer.lr' is 0.0001, which has no keys"),
        ("a.b=[", "override 'a.b=['"),
    ],
)
def test_one_sentence_for_each_mistake(tmp_path, override, expected):
    assert expected in refused(write(tmp_path), override)


def test_messages_begin_with_the_file_and_the_overrides(tmp_path):
    path = write(tmp_path, BASE + "traner: {}\n")
    assert refused(path) == f"{path}: unknown key 'traner' (did you mean 'trainer'?)"
    assert refused(path, "seed=1").startswith(f"{path} with seed=1: ")


def test_an_override_that_every_stage_hides_is_refused(tmp_path):
    path = write(tmp_path, BASE + "stages: [{trainer: {steps: 3}}, {trainer: {steps: 4}}]\n")
    assert "use stages.0.trainer.steps=" in refused(path, "trainer.steps=9")
    assert [s.trainer.steps for s in load_config(path, ["stages.1.trainer.steps=9"]).stages] == [3, 9]
    assert load_config(path, ["trainer.lr=0.5"]).stages[1].trainer.lr == 0.5


def test_files_that_are_no_configs(tmp_path):
    assert "did you mean 'run.yaml'" in refused(write(tmp_path).with_name("rum.yaml"))
    assert "is a folder" in refused(tmp_path)
    assert f"{tmp_path}/bad.yaml:3: " in refused(write(tmp_path, "a: 1\nb: [1,\nc: }", "bad.yaml"))
    twice = write(tmp_path, "trainer:\n  lr: 1\n  lr: 2\n", "twice.yaml")
    assert refused(twice) == f"{twice}:3: key 'lr' is given twice"
    assert "should hold 'key: value' pairs, but holds a list" in refused(write(tmp_path, "- a", "list.yaml"))
    assert "'pipeline' is missing" in refused(write(tmp_path, "", "empty.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path / "binary.yaml")


def test_yaml_builds_plain_values_only(tmp_path):
    assert "could not determine a constructor" in refused(
        write(tmp_path, "pipeline: !!python/object/apply:os.system ['true']")
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("12", 12),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1e", "1e"),
        ("v1.5", "v1.5"),
    ],
)
def test_yaml_scalars(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)
    # What PyYAML writes, this reads back.
    assert parse_yaml(yaml.safe_dump({"x": value}), "test") == {"x": value}


def test_overrides_and_merging_leave_their_arguments_alone():
    data = {"a": {"b": [1, {"c": 2}]}}
    apply_override(data, *parse_override("a.b.1.c=[3]"))
    apply_override(data, *parse_override("a.n.m=x=y"))
    assert data == {"a": {"b": [1, {"c": [3]}], "n": {"m": "x=y"}}}
    base = {"algorithm": {"type": "a", "x": 1}, "t": {"k": {"p": 1, "q": 2}}}
    merged = merge(base, {"algorithm": {"type": "b"}, "t": {"k": {"q": 3}}})
    assert merged == {"algorithm": {"type": "b"}, "t": {"k": {"p": 1, "q": 3}}}
    assert base["t"]["k"]["q"] == 2


def test_every_registered_algorithm_can_be_built_from_its_defaults(tmp_path):
    offered = resolve("pipeline", "diffusion").verbs
    teacher = {"teacher": {"type": "diffusion", "model": "builtin:sd3-shapes"}}
    needed = {"distill": teacher, "distill_predictions": teacher}
    for name in ALGORITHMS:
        options = needed.get(name, {})
        overrides = [f"algorithm={json.dumps({'type': name, **options})}", "rewards=[{type: pixels}]"]
        overrides.append("pipeline.value_head=true")
        if resolve("algorithm", name)(**ALGORITHMS[name].defaults, **options).verbs <= offered:
            stage = load_config(write(tmp_path), overrides).stages[0]
            assert build_algorithm(stage.algorithm).verbs <= offered
        else:
            assert "but pipeline 'diffusion' offers" in refused(write(tmp_path), *overrides)
    gdpo = load_config(write(tmp_path), ["algorithm=gdpo"]).stages[0].algorithm
    assert build_algorithm(gdpo).credit.method == "gdpo"


def test_every_registered_component_has_typed_options_that_do_not_clash():
    for kind in ("pipeline", "algorithm", "reward"):
        for name in entries(kind):
            model = component_model(kind, name)
            assert model.model_config["extra"] == "forbid", name
            if kind == "reward":
                assert not set(model.model_fields) & (set(term_model().model_fields) | {"type"}), name
    assert {"diffusion", "vlm"} <= set(PIPELINES)


def test_a_policy_is_loaded_and_wrapped_and_may_refuse_options(tmp_path):
    (tmp_path / "toy.py").write_text(
        "from mmrl.errors import UserError\n"
        "class Toy:\n"
        "    verbs = frozenset({'fit'})\n"
        "    def __init__(self, net, width: int = 2, dtype: str | None = None, device: str | None = None):\n"
        "        self.made = (net, width, dtype, device)\n"
        "    @staticmethod\n"
        "    def load(model: str, dtype: str = 'float32'):\n"
        "        return f'{model} in {dtype}'\n"
        "    @staticmethod\n"
        "    def validate(width, **options):\n"
        "        if width > 9:\n"
        "            raise UserError(f'pipeline.width is {width}, but this model has 9')\n"
    )
    toy = ["pipeline={type: toy.py:Toy, model: m, dtype: half}", "algorithm=sft", "rewards=[]"]
    config = load_config(write(tmp_path), toy)
    policy = build_policy(config.pipeline, device="cpu")
    assert policy.made == ("m in half", 2, "half", "cpu")
    assert "pipeline.width is 10, but this model has 9" in refused(write(tmp_path), *toy, "pipeline.width=10")
    assert "'pipeline.model' is missing" in refused(write(tmp_path), "pipeline={type: toy.py:Toy}")
    message = refused(write(tmp_path), toy[0])
    assert "algorithm 'grpo' needs a policy that offers decisions, rollout" in message
    assert message.endswith("offers fit")


def test_options_come_from_a_signature():
    def build(samples, size: "int | None" = None, copy: bool = False, **more):
        """Nothing."""

    model = options_model(build, skip=("samples",))
    found = values(validate(model, {"size": 3, "copy": True, "extra": 1}, where="here", path="it"))
    assert found == {"size": 3, "copy": True, "extra": 1}
    with pytest.raises(UserError, match=r"here: 'it.size' is 'a', but should be a whole number"):
        validate(model, {"size": "a"}, where="here", path="it")


def test_the_page_about_configuration_names_every_option():
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for model in (DataOptions, TrainerOptions, EvalOptions, term_model()):
        for name in model.model_fields:
            assert f"`{name}`" in page, name
    example = page.partition("```yaml\n")[2].partition("```")[0]
    text = example.replace("prompts/train.txt", "[a]").replace("prompts/held_out.txt", "[b]")
    assert parse_config(parse_yaml(text, "page")).stages[0].algorithm.options["group_size"] == 24

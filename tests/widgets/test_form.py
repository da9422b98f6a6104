"""The generated form: every setting has a field, what is typed becomes its value, what is wrong is said beside it."""

import html

import pytest

from nbtune import LoraConfig, RunSpec
from nbtune.errors import SpecError
from nbtune.peft import C3AConfig, HiraConfig, LoKrConfig, PeftType, PromptTuningConfig, TrainableTokensConfig
from nbtune.spec import settings
from nbtune_widgets.form import Field, FieldError, Group
from nbtune_widgets.specform import FormError, SpecForm


@pytest.fixture
def form():
    return SpecForm(lambda part, name: None)


def test_every_setting_has_a_field_with_its_help_and_default(form):
    """There is no second list of fields: a new setting is in the form by being in the spec."""
    assert list(form.fields) == [setting.path for setting in settings()]
    for field in form.fields.values():
        assert field.setting.help in field._help.value.replace("&#x27;", "'")
        assert field.value == field.setting.default


@pytest.mark.parametrize("kind", list(PeftType))
def test_every_method_has_its_form(form, kind):
    form.method = kind
    assert list(form.fields) == [setting.path for setting in settings(form.spec.method)]
    for path, field in form.fields.items():
        assert field.error == ""
        assert html.escape(field.setting.help, quote=True) in field._help.value, path
        assert field.value == field.setting.default, path
    assert form.spec == RunSpec(method=kind)


def test_the_untouched_form_is_the_default_spec(form):
    assert form.spec == RunSpec()


@pytest.mark.parametrize(
    ("path", "typed", "value"),
    [
        ("training.max_steps", "8", 8),
        ("training.learning_rate", "2e-4", 2e-4),
        ("training.learning_rate", " .001 ", 1e-3),
        ("method.target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("method.target_modules", "q_proj", ["q_proj"]),
        ("method.target_modules", "all-linear", "all-linear"),
        ("method.target_modules", r".*\.(q|k)_proj", r".*\.(q|k)_proj"),
        ("method.target_modules", "", None),
        ("method.layers_to_transform", "1, 2", [1, 2]),
        ("method.layers_to_transform", "", None),
        ("method.rank_pattern", "q_proj: 4, v_proj: 8", {"q_proj": 4, "v_proj": 8}),
        ("method.trainable_token_indices", "3, 4", [3, 4]),
        ("method.trainable_token_indices", "embed_tokens: [3, 4]", {"embed_tokens": [3, 4]}),
        ("method.eva_config", "rho: 1.5, tau: 0.9", {"rho": 1.5, "tau": 0.9}),
        ("method.eva_config", "", None),
        ("method.loftq_config", "", {}),
        ("model.revision", "", None),
        ("data.max_rows", "100", 100),
    ],
)
def test_typed(form, path, typed, value):
    form.fields[path].control.value = typed
    assert form.fields[path].error == ""
    assert form.fields[path].value == value
    part, name = path.split(".")
    assert form.spec.to_dict()[part][name] == value


@pytest.mark.parametrize(
    ("path", "typed", "reason"),
    [
        ("training.max_steps", "eight", "Must be a whole number"),
        ("training.max_steps", "2.5", "Must be a whole number"),
        ("training.max_steps", "", "Must be a whole number"),
        ("training.learning_rate", "fast", "Must be a number"),
        ("training.learning_rate", "0", "Must be greater than 0"),
        ("data.eval_fraction", "1", "Must be less than 1"),
        ("method.r", "0", "Must be greater than or equal to 1"),
        ("method.rank_pattern", "q_proj: many", "Must be a whole number"),
        ("method.layers_to_transform", "[1, 2", None),
    ],
)
def test_what_is_wrong_is_said_at_the_field(form, path, typed, reason):
    field = form.fields[path]
    field.control.value = typed
    if reason is None:  # forgiven: brackets are optional
        assert field.value == [1, 2]
        return
    assert reason in field.error
    assert reason in field._help.value
    with pytest.raises(FieldError):
        _ = field.value
    with pytest.raises(FormError, match=path):
        _ = form.spec
    field.value = field.setting.default
    assert field.error == ""
    assert form.spec == RunSpec()


def test_fields_that_do_not_fit_each_other_are_marked(form):
    form.fields["training.max_steps"].value = 0
    with pytest.raises(FormError, match="max_steps is 0"):
        _ = form.spec
    assert "max_steps is 0" in form.fields["training.max_steps"].error
    form.fields["training.max_steps"].value = 3
    assert form.spec.training.max_steps == 3


def test_a_mark_goes_when_another_field_makes_it_right(form):
    form.fields["method.target_modules"].value = r".*q_proj"
    form.fields["method.layers_to_transform"].value = [1]
    with pytest.raises(FormError, match="regex"):
        _ = form.spec
    assert any(field.error for field in form.fields.values())
    form.fields["method.target_modules"].value = ["q_proj"]
    assert form.spec.method.layers_to_transform == [1]
    assert not any(field.error for field in form.fields.values())


def test_set_by_name_part_and_rows(form):
    rows = [{"prompt": "a", "completion": "b"}] * 4
    form.set(max_steps=8, r=4, data=rows)
    spec = form.spec
    assert (spec.training.max_steps, spec.method.r) == (8, 4)
    assert list(spec.data.rows) == rows
    form.set(eval_fraction=0.5)
    assert list(form.spec.data.rows) == rows
    form.set(method="full")
    assert form.spec.method == "full"
    assert not any(path.startswith("method.") for path in form.fields)
    form.set(method=LoraConfig(r=32))
    assert form.spec.method.r == 32


@pytest.mark.parametrize("changes", [{"no_such": 1}, {"max_steps": 0}, {"r": -1}, {"method": "no_such"}])
def test_set_refuses_and_changes_nothing(form, changes):
    before = form.spec
    with pytest.raises(SpecError):
        form.set(**changes)
    assert form.spec == before


def test_any_spec_goes_through_the_form_unchanged(form):
    spec = RunSpec(
        model={"name": "some/model", "revision": "main", "dtype": "float32"},
        data={
            "source": "x.jsonl",
            "max_rows": 10,
            "eval_fraction": 0.0,
            "columns": {"prompt": "{a}\n{b}"},
            "recipe": [{"step": "length", "at_most": 9}],
            "mix": [{"source": "y.jsonl", "weight": 0.5}],
        },
        method=LoraConfig(r=3, lora_alpha=1.5, rank_pattern={"q_proj": 2}, target_modules="all-linear"),
        training={"max_steps": 5, "adam_epsilon": 1e-9, "packing": False},
        tracking={"mlflow": False, "tracking_uri": "http://127.0.0.1:5000"},
    )
    form.load(spec)
    assert form.spec == spec
    assert not any("\n" in str(field.control.value) for field in form.fields.values())  # a line of text has one line


@pytest.mark.parametrize(
    "method",
    [
        LoraConfig(init_lora_weights="pissa_niter_4", trainable_token_indices={"embed_tokens": [1, 2]}),
        LoraConfig(init_lora_weights=False, rank_pattern={r".*\.[0-3]\.(q|k)_proj{1,2}": 4}, eva_config={"rho": 1.5}),
        LoraConfig(target_modules=["layers.0.mlp.up_proj", "k_proj"], exclude_modules="model.layers.1.*"),
        C3AConfig(init_weights=True, block_size_pattern={"q_proj": 8}),
        HiraConfig(init_weights=None),
        LoKrConfig(init_weights="lycoris"),
        TrainableTokensConfig(token_indices=[4, 2]),
        PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="Answer: 1, 2"),
    ],
    ids=repr,
)
def test_any_method_goes_through_the_form_unchanged(form, method):
    form.load(RunSpec(method=method))
    assert form.spec.method == method
    form.load(RunSpec(method=type(method)()))
    assert form.spec.method == type(method)()


def test_advanced_is_folded_and_counts_what_was_changed():
    fields = {setting.path: Field(setting) for setting in settings() if setting.part == "training"}
    group = Group(list(fields.values()))
    assert group.toggle.description == "▸ Advanced"
    assert group._more.layout.display == "none"
    fields["training.weight_decay"].value = 0.1
    fields["training.max_steps"].value = 3  # not an advanced one
    group.refresh()
    assert group.toggle.description == "▸ Advanced (1 changed)"
    group.toggle.value = True
    assert group._more.layout.display is None
    group.toggle.value = False
    fields["training.weight_decay"].control.value = "heavy"
    group.refresh()
    assert group._more.layout.display is None  # what is wrong must be seen

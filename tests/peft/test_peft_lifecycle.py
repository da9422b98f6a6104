"""Adding, switching, disabling, deleting, running a cell twice: what an adapter's life promises."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import llama, logits
from torch import nn

from nbtune.errors import AdapterError
from nbtune.peft import AdapterLayer, LoraConfig, PeftModel, get_peft_model
from nbtune.peft.layer import Adapter

RANDOM = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
ATTENTION = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a, b, atol=atol, rtol=0)


@pytest.fixture
def two(base):
    """A model with adapters `a` (all linear layers, active) and `b` (attention)."""
    model = get_peft_model(base, RANDOM, "a")
    model.add_adapter("b", ATTENTION)
    return model.eval()


def test_a_new_adapter_changes_nothing(make, ids):
    model = get_peft_model(make(), LoraConfig())
    assert torch.equal(logits(model, ids), logits(make(), ids))


def test_only_the_adapter_is_trained(base, ids):
    model = get_peft_model(base, RANDOM)
    model(input_ids=ids, labels=ids).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".adapters." in name}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_parameters_are_counted_as_peft_counts_them(base, capsys):
    import peft

    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"])).print_trainable_parameters()
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).print_trainable_parameters()
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs


def test_switching_and_several_at_once(two, make, ids):
    plain = logits(make(), ids)
    a = logits(two, ids)
    two.set_adapter("b")
    assert two.active_adapters == ["b"]
    b = logits(two, ids)
    assert not same(a, b)
    assert not same(b, plain)
    two.set_adapter("a")
    assert torch.equal(logits(two, ids), a)


def test_two_active_adapters_add_up():
    """In one layer the updates add up exactly; deeper in a model the layers between them are not linear."""
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"proj": nn.Linear(6, 5)}), torch.randn(2, 3, 6)
    plain = base["proj"](x)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=2, target_modules=["proj"], init_lora_weights=False))
    layer = base["proj"]
    each = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        each[name] = layer(x) - plain
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), plain + each["a"] + each["b"])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain + each["a"] + each["b"])


def test_disabled_is_the_base_also_after_an_error(two, make, ids):
    plain, a = logits(make(), ids), logits(two, ids)
    with two.disable_adapter():
        with two.disable_adapter():
            assert torch.equal(logits(two, ids), plain)
        assert torch.equal(logits(two, ids), plain)
    with pytest.raises(AdapterError), two.disable_adapter():
        two.set_adapter("nobody")
    assert torch.equal(logits(two, ids), a)


def test_switching_and_disabling_touch_no_layer(two, monkeypatch):
    """Their cost cannot depend on the number of layers or adapters: they read and write no module."""
    touched = []
    original = nn.Module.__setattr__
    monkeypatch.setattr(nn.Module, "__setattr__", lambda *args: (touched.append(args), original(*args))[1])
    monkeypatch.setattr(nn.Module, "named_children", lambda self: touched.append(self) or iter(()))
    monkeypatch.setattr(nn.Module, "_named_members", lambda self, *_, **__: touched.append(self) or iter(()))
    two.set_adapter("b")
    two.set_adapter(["a", "b"])
    assert touched == []


def test_a_forward_pass_asks_only_for_the_active_adapters(base, ids):
    model = get_peft_model(base, ATTENTION, "a0")
    for number in range(1, 8):
        model.add_adapter(f"a{number}", ATTENTION)
    called = []
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            for name, adapter in layer.adapters.items():
                adapter.register_forward_hook(lambda *_, name=name: called.append(name))
    model.set_adapter("a5")
    logits(model, ids)
    assert set(called) == {"a5"}
    assert len(called) == 3 * 2


def test_deleting(two, base, make, ids):
    two.set_adapter("b")
    b = logits(two, ids)
    two.delete_adapter("a")
    assert torch.equal(logits(two, ids), b)
    assert list(two.peft_config) == ["b"]
    assert not any(isinstance(module, AdapterLayer) for name, module in base.named_modules() if "mlp" in name)
    two.delete_adapter("b")
    assert torch.equal(logits(two, ids), logits(make(), ids))
    assert two.active_adapters == []
    assert [type(module) for module in base.modules()] == [type(module) for module in make().modules()]


def test_deleting_the_active_adapter_says_which_is_active_now(two):
    with pytest.warns(UserWarning, match="'b' is active now"):
        two.delete_adapter("a")
    assert two.active_adapters == ["b"]


def test_deleting_one_of_two_active_ones_leaves_the_other(two):
    two.set_adapter(["a", "b"])
    two.delete_adapter("a")
    assert two.active_adapters == ["b"]


@pytest.mark.parametrize("again", ["base", "model"])
def test_running_the_cell_twice_is_running_it_once(make, ids, tmp_path, again):
    torch.manual_seed(7)
    once = get_peft_model(make(), ATTENTION).eval()

    base = make()
    model = get_peft_model(base, RANDOM)  # other targets, as while trying things out
    model.merge_adapter()
    torch.manual_seed(7)
    model = get_peft_model(base if again == "base" else model, ATTENTION).eval()

    assert torch.equal(logits(model, ids), logits(once, ids))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in once.named_parameters()}
    assert model.peft_config == once.peft_config
    for name, adapted in (("twice", model), ("once", once)):
        adapted.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()


def test_another_name_on_the_same_base_keeps_the_first_adapter(base, ids):
    first = get_peft_model(base, RANDOM, "a").eval()
    a = logits(first, ids)
    second = get_peft_model(base, ATTENTION, "b")
    assert second.active_adapters == first.active_adapters == ["b"]  # two views of one model
    first.set_adapter("a")
    assert torch.equal(logits(second, ids), a)


def test_a_refused_config_leaves_the_adapters_that_there_were(two, ids):
    before = logits(two, ids)
    for call in (
        lambda: get_peft_model(two, LoraConfig(target_modules=["nope"]), "a"),
        lambda: two.load_adapter("x", "a"),
    ):
        with pytest.raises(AdapterError):
            call()
        assert two.active_adapters == ["a"]
        assert torch.equal(logits(two, ids), before)


def test_unload_gives_the_base_back(two, base, make, ids):
    two.merge_adapter()
    unloaded = two.unload()
    assert unloaded is base
    assert torch.equal(logits(base, ids), logits(make(), ids))
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.state_dict().keys() == make().state_dict().keys()
    assert logits(get_peft_model(base, RANDOM), ids).shape == (3, 11, 96)  # and it can be adapted again


def test_freezing_and_thawing(two):
    two.set_requires_grad("a", False)
    two.set_requires_grad(["b"], True)
    trainable = {name.split(".adapters.")[1][0] for name, p in two.named_parameters() if p.requires_grad}
    assert trainable == {"b"}


def test_a_frozen_adapter_says_so_before_it_is_trained(two):
    two.set_requires_grad("a", False)
    with pytest.warns(UserWarning, match="adapter a is frozen: training it changes nothing"):
        two.train()
    two.set_adapter("b")
    two.train()
    assert two.training


def test_the_model_answers_for_its_base(base, ids):
    model = get_peft_model(base, RANDOM)
    assert model.get_base_model() is base is model.base_model.model
    assert model.config is base.config
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.get_output_embeddings() is base.get_output_embeddings()
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 14)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    layer = base.model.layers[0].mlp.up_proj
    assert isinstance(layer, AdapterLayer)
    assert layer.weight is layer.base_layer.weight
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 48, None)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = layer.nothing_like_it


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_under_gradient_checkpointing(base, ids, reentrant):
    model = get_peft_model(base, RANDOM).train()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_a_copy_is_a_model_of_its_own(two, ids):
    a = logits(two, ids)
    twin = copy.deepcopy(two)
    twin.set_adapter("b")
    assert two.active_adapters == ["a"]
    assert torch.equal(logits(two, ids), a)
    assert not same(logits(twin, ids), a)


def test_a_model_is_given_back_without_a_garbage_collection():
    """A base model in a reference cycle would be in memory twice when the next one is loaded."""
    base = llama()
    model = get_peft_model(base, RANDOM)
    watch = weakref.ref(base)
    gc.disable()
    try:
        del base, model
        assert watch() is None
    finally:
        gc.enable()


def test_bfloat16_base_with_a_float32_adapter(base, ids):
    """The adapter's weights are cast to the input's precision; the input is never copied to fp32."""
    model = get_peft_model(base.to(torch.bfloat16), RANDOM).eval()
    layer = base.model.layers[0].mlp.up_proj
    adapter = layer.adapters["default"]
    assert adapter.lora_A.dtype == torch.float32
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    y = layer(x)
    exact = x.float() @ (layer.weight.float() + adapter.delta_weight(layer.base_layer)).T
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)
    model(input_ids=ids, labels=ids).loss.backward()
    assert adapter.lora_B.grad.dtype == torch.float32


def test_autocast_computes_in_its_precision(base, ids):
    model = get_peft_model(base, RANDOM).eval()
    expected = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits.float(), expected, atol=0.1, rtol=0)
        model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 2, 3, 6), (0, 6)])
def test_inputs_of_any_shape(shape):
    torch.manual_seed(0)
    base = nn.ModuleDict({"proj": nn.Linear(6, 5)})
    get_peft_model(base, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    layer, x = base["proj"], torch.randn(shape)
    expected = nn.functional.linear(
        x, layer.weight + layer.adapters["default"].delta_weight(layer.base_layer), layer.bias
    )
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    if x.ndim == 3:
        torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1))


def test_dropout_only_in_training_and_only_on_the_adapter(base, ids):
    model = get_peft_model(base, RANDOM.replace(lora_dropout=0.5)).eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(model, ids))


def test_one_graph_when_compiled(base, ids):
    """No graph break, and going back to an adapter that was met already compiles nothing new."""
    import torch._dynamo as dynamo

    model = get_peft_model(base, RANDOM, "a").eval()
    model.add_adapter("b", ATTENTION)
    layer = base.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    graphs = []
    dynamo.reset()
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for name in ("a", "b", "a", "b"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 2


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "__base__", "train", "keys"])
def test_names_that_cannot_be_names(base, name):
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        get_peft_model(base, RANDOM, name)


def test_names_that_are_not_there(two):
    for call in (two.set_adapter, two.delete_adapter, two.set_requires_grad, lambda name: two.merge_adapter([name])):
        with pytest.raises(AdapterError, match=r"There is no adapter 'aa'; there are: a, b\."):
            call("aa")
    with pytest.raises(AdapterError, match="There is an adapter 'a' already"):
        two.add_adapter("a", RANDOM)
    with pytest.raises(AdapterError, match="The config is a dict"):
        two.add_adapter("c", {"r": 4})


def test_an_adapter_that_says_only_its_delta_works():
    """The next method needs no more than this."""

    class Full(Adapter):
        def __init__(self, delta):
            super().__init__()
            self.delta = nn.Parameter(delta)

        def delta_weight(self, base):
            return self.delta

    torch.manual_seed(0)
    base, x = nn.Linear(4, 3), torch.randn(2, 4)
    adapter = Full(torch.randn(3, 4))
    torch.testing.assert_close(
        adapter(x, base(x), base), nn.functional.linear(x, base.weight + adapter.delta, base.bias)
    )
    torch.testing.assert_close(adapter.merged_weight(base.weight, base), base.weight + adapter.delta)
    assert isinstance(PeftModel(nn.ModuleDict({"proj": base})), PeftModel)

"""What must be true of every method that adapts layers, as one class of tests; `peft` is the oracle.

class TestIA3(MethodTests):
    config, oracle = IA3Config, peft.IA3Config
    cases = [("llama", {"target_modules": ["k_proj"]}), ...]     # a model of tiny_models.py, and settings
"""

from __future__ import annotations

import json
import warnings
from typing import Any, ClassVar

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nbtune.peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from nbtune.peft.config import PeftConfig
from nbtune.peft.layer import AdapterLayer

ROWS, TOKENS = 4, 9


def inputs(name: str) -> dict[str, Tensor]:
    """A batch for one of the tiny models, with labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 96, (ROWS, TOKENS), generator=generator)
    if name == "bert":
        return {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}
    if name == "t5":
        return {"input_ids": ids, "labels": torch.randint(1, 96, (ROWS, 5), generator=generator)}
    return {"input_ids": ids, "labels": ids}


def outputs(model: Any, name: str, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name), **kwargs).logits


def disturb(model: nn.Module, noise: float, seed: int = 5) -> None:
    """Other values in all that is trained, also in saved modules, which start as copies of the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))


def losses(model: Any, name: str, learning_rate: float, steps: int = 10) -> Tensor:
    """The losses of some steps of AdamW, in training mode."""
    return trained(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate), name, steps
    )


def trained(model: Any, optimizer: torch.optim.Optimizer, name: str = "llama", steps: int = 10) -> Tensor:
    """The losses of some steps of an optimiser, in training mode."""
    model.train()
    seen = []
    for _ in range(steps):
        loss = model(**inputs(name)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return torch.tensor(seen)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


class MethodTests:
    """The invariants; a subclass names its configs and cases. Each test runs on every case, or once per model."""

    config: ClassVar[type[PeftConfig]]
    oracle: ClassVar[type[peft.PeftConfig]]
    cases: ClassVar[list[tuple[str, dict[str, Any]]]]
    thorough: ClassVar[bool] = False  # run every test on every case
    noise: ClassVar[float] = 0.05
    change: ClassVar[float] = 1e-3  # what the noise at least does to the logits
    learning_rate: ClassVar[float] = 1e-2
    adds: ClassVar[bool] = True  # whether two active adapters give in `peft` what they should
    oracle_is_right: ClassVar[bool] = True  # whether `peft` itself gives the right logits for all cases
    constants: ClassVar[
        tuple[str, ...]
    ] = ()  # endings of names in the file that are not trained (PEFT's indices, norms)

    def adapted(self, make, case, name="default", seed=5) -> PeftModel:
        model, settings = case
        ours = get_peft_model(make(model), self.config(**settings), name)
        disturb(ours, self.noise, seed)
        return ours.eval()

    def two(self, make, case) -> PeftModel:
        """Two adapters, `a` and `b`, with other weights; `a` is active."""
        ours = self.adapted(make, case, "a")
        ours.add_adapter("b", self.config(**case[1]))
        with torch.no_grad():
            for parameter in ours.parameters():  # they start from one seed or from zeros: make them differ
                if parameter.requires_grad:
                    parameter.add_(0.5 * self.noise * torch.randn(parameter.shape))
        return ours.eval()

    def test_saved_here_loads_in_peft(self, make, case, tmp_path):
        ours = self.adapted(make, case)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(case[0]), tmp_path).eval()
        close(outputs(ours, case[0]), outputs(theirs, case[0]))
        assert (outputs(ours, case[0]) - outputs(make(case[0]), case[0])).abs().max() > self.change

    def test_saved_in_peft_loads_here(self, make, case, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(make(case[0]), self.oracle(**case[1])).eval()
        disturb(theirs, self.noise)
        theirs.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # an unknown setting, say
            ours = PeftModel.from_pretrained(make(case[0]), tmp_path)
        close(outputs(ours, case[0]), outputs(theirs, case[0]))
        assert (outputs(ours, case[0]) - outputs(make(case[0]), case[0])).abs().max() > self.change

    def test_the_config_file_says_what_peft_says(self, make, case, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(make(case[0]), self.oracle(**case[1])).save_pretrained(tmp_path / "theirs")
        get_peft_model(make(case[0]), self.config(**case[1])).save_pretrained(tmp_path / "ours")
        theirs, ours = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
        for ordered in (theirs, ours):  # PEFT writes sets, in any order; its version is not ours
            ordered.pop("peft_version", None)
            ordered.pop("fan_in_fan_out", None)  # PEFT sets it with a warning; here the layer shows it
            for key, value in ordered.items():
                ordered[key] = sorted(value) if isinstance(value, list) else value
        assert ours.keys() - theirs.keys() == set()
        assert {key: ours.get(key, "absent") for key in theirs} == theirs

    def test_ten_steps_give_the_losses_of_peft(self, make, case, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(make(case[0]), self.oracle(**case[1]))
        theirs.save_pretrained(tmp_path)
        ours = PeftModel.from_pretrained(make(case[0]), tmp_path, is_trainable=True)
        mine, expected = (losses(model, case[0], self.learning_rate) for model in (ours, theirs))
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
        assert mine[-1] < mine[0]

    @pytest.mark.once_per_model
    def test_merged_equals_unmerged_and_the_base_comes_back_bit_for_bit(self, make, case):
        ours = self.adapted(make, case)
        expected = outputs(ours, case[0])
        ours.merge_adapter()
        close(outputs(ours, case[0]), expected, atol=2e-5)
        ours.unmerge_adapter()
        assert torch.equal(outputs(ours, case[0]), expected)
        plain = ours.merge_and_unload()
        close(outputs(plain, case[0]), expected, atol=2e-5)
        assert not any(isinstance(module, AdapterLayer) for module in plain.modules())

    @pytest.mark.once_per_model
    def test_unloading_gives_the_base_bit_for_bit(self, make, case):
        ours = self.adapted(make, case)
        for _ in range(3):
            ours.merge_adapter()
            ours.unmerge_adapter()
        plain, base = ours.unload().state_dict(), make(case[0]).state_dict()
        assert plain.keys() == base.keys()
        assert all(torch.equal(plain[key], base[key]) for key in base)

    @pytest.mark.once_per_model
    def test_disabled_is_the_base(self, make, case):
        ours = self.adapted(make, case)
        with ours.disable_adapter():
            assert torch.equal(outputs(ours, case[0]), outputs(make(case[0]), case[0]))
        ours.merge_adapter()
        with ours.disable_adapter():
            assert torch.equal(outputs(ours, case[0]), outputs(make(case[0]), case[0]))

    @pytest.mark.once_per_model
    def test_only_the_adapter_gets_gradients(self, make, case):
        ours = self.adapted(make, case).train()
        ours(**inputs(case[0])).loss.backward()
        for name, parameter in ours.named_parameters():
            assert parameter.requires_grad == (".adapters." in name), name
            assert (parameter.grad is not None) == (".adapters." in name), name

    @pytest.mark.once_per_model
    def test_two_active_adapters(self, make, case, tmp_path):
        if case[1].get("modules_to_save") or case[1].get("task_type") == "SEQ_CLS":
            pytest.skip("two adapters cannot both replace a module")
        ours = self.two(make, case)
        ours.set_adapter(["a", "b"])
        together = outputs(ours, case[0])
        ours.merge_adapter()
        close(outputs(ours, case[0]), together, atol=3e-5)
        ours.unmerge_adapter()
        for alone in ("a", "b"):
            ours.set_adapter(alone)
            assert (outputs(ours, case[0]) - together).abs().max() > self.change / 10
        if self.adds and case[1].get("bias", "none") == "none":
            ours.save_pretrained(tmp_path)
            theirs = peft.PeftModel.from_pretrained(make(case[0]), tmp_path / "a", "a").eval()
            theirs.load_adapter(tmp_path / "b", "b")
            theirs.base_model.set_adapter(["a", "b"])
            close(outputs(theirs, case[0]), together, atol=3e-5)

    @pytest.mark.once_per_model
    def test_each_row_has_its_adapter(self, make, case):
        ours = self.two(make, case)
        expected = {}
        for name in ("a", "b"):
            ours.set_adapter(name)
            expected[name] = outputs(ours, case[0])
        with ours.disable_adapter():
            expected["__base__"] = outputs(ours, case[0])
        for rows in (["b", "a", "__base__", "b"], ["a", "b", "b", "a"], ["b", "b", "b", "b"], ["__base__"] * 4):
            mixed = outputs(ours, case[0], adapter_names=rows)
            close(mixed, torch.stack([expected[name][row] for row, name in enumerate(rows)]), atol=2e-5)

    @pytest.mark.once_per_model
    def test_rows_train_their_own_adapter(self, make, case):
        """The gradient of a mixed batch is that of the rows with that adapter, alone."""
        ours = self.two(make, case)
        ours.set_requires_grad(["a", "b"])
        weights = torch.randn(outputs(ours, case[0]).shape, generator=torch.Generator().manual_seed(7))
        batch = {key: value for key, value in inputs(case[0]).items() if key != "labels" or case[0] == "t5"}
        (ours(**batch, adapter_names=["b", "a", "__base__", "b"]).logits * weights).sum().backward()
        mixed = {name: p.grad for name, p in ours.named_parameters() if ".adapters.b." in name}
        ours.zero_grad()
        ours.set_adapter("b")
        rows = torch.tensor([0, 3])
        (ours(**{key: value[rows] for key, value in batch.items()}).logits * weights[rows]).sum().backward()
        assert mixed
        for name, gradient in mixed.items():
            assert gradient is not None, name
            torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=2e-4, rtol=1e-3)

    @pytest.mark.once_per_model
    def test_the_file_holds_what_is_trained_and_no_more(self, make, case, tmp_path):
        ours = self.adapted(make, case)
        ours.save_pretrained(tmp_path / "once")
        loaded = PeftModel.from_pretrained(make(case[0]), tmp_path / "once")
        assert torch.equal(outputs(loaded, case[0]), outputs(ours, case[0]))
        loaded.save_pretrained(tmp_path / "twice")
        files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("once", "twice")]
        assert files[0] == files[1]
        stored = {k: v for k, v in safetensors.torch.load(files[0]).items() if not k.endswith(self.constants or "\0")}
        trained = sum(p.numel() * p.element_size() for p in ours.parameters() if p.requires_grad)
        assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == trained

    @pytest.mark.once_per_model
    def test_on_the_meta_device_it_has_the_same_shapes(self, make, case):
        ours, meta = (
            get_peft_model(model, self.config(**case[1])) for model in (make(case[0]), make(case[0]).to("meta"))
        )
        shapes = [
            {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()} for model in (ours, meta)
        ]
        assert shapes[0] == shapes[1]
        assert ours.get_nb_trainable_parameters()[0] == meta.get_nb_trainable_parameters()[0]

    @pytest.mark.once_per_model
    def test_a_bfloat16_base_stays_bfloat16(self, make, case):
        exact = self.adapted(make, case)
        ours = get_peft_model(make(case[0]).to(torch.bfloat16), self.config(**case[1]))
        set_peft_model_state_dict(ours, get_peft_model_state_dict(exact))
        result = ours.train()(**inputs(case[0]))
        assert result.logits.dtype is torch.bfloat16
        result.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.requires_grad)
        expected = outputs(exact, case[0])
        error = (outputs(ours.eval(), case[0]).float() - expected).norm() / expected.norm()
        assert error < 0.05

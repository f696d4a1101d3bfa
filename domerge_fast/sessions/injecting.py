"""An adapter of PEFT's in a live model, and the model as it was before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DomergeError, OptionError, some
from ..formats.peft.read import unwrapped

__all__ = ["Injected"]


@dataclass(eq=False)
class Injected:
    """The adapter's layers by module, and what brings the model back."""

    adapter: str
    layers: Mapping[str, Any]
    dtype: torch.dtype | None
    before: _Before
    hooks: list[Any] = field(default_factory=list)
    undone: bool = False

    @classmethod
    def into(
        cls, model: Any, adapter: str, names: Sequence[str], dtype: torch.dtype | None
    ) -> Injected:
        """A new adapter of the model, alone active, of modules by name; its factors are to be
        given. dtype: of these, None for that of each module's weight.

        OptionError for modules that the model lacks or that are not linear, adapters that are
        merged into their layers, a taken name, and dropout that is on; the model is as it was then.
        """
        peft = _peft()
        tuner = _tuner(peft, model)
        inner = tuner.model if tuner is not None else model
        _check(peft, inner, adapter, names)
        before = _Before.of(peft, model, tuner, adapter)
        try:
            _inject(peft, inner, tuner, adapter, names)
            layers = {name: inner.get_submodule(name) for name in names}
            _check_layers(layers, adapter)
            before.activate(layers.values())
        except BaseException:
            before.restore()
            raise
        return cls(adapter, layers, dtype, before)

    def give(self, name: str, a: Tensor, bt: Tensor, copied: bool) -> None:
        """Let bases [k, n] and [k', m] be A and B, with rows of zeros where one has fewer. copied:
        never in their own memory."""
        layer = self.layers[name]
        weight = layer.get_base_layer().weight
        dtype = self.dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
        rank = max(len(a), len(bt))
        a, b = (_longer(x, rank).to(weight.device, dtype, copy=copied) for x in (a, bt))
        pairs = (layer.lora_A[self.adapter], a), (layer.lora_B[self.adapter], b.T.contiguous())
        for linear, x in pairs:
            linear.weight = nn.Parameter(x, requires_grad=False)
            linear.out_features, linear.in_features = x.shape
        layer.r[self.adapter] = layer.lora_alpha[self.adapter] = rank
        layer.scaling[self.adapter] = 1.0

    def silence(self, name: str, side: str) -> None:
        """A or B is zeros."""
        part = {"A": "lora_A", "B": "lora_B"}[side]
        getattr(self.layers[name], part)[self.adapter].weight.data.zero_()

    def weights(self, name: str) -> tuple[Tensor, Tensor]:
        """A [q, n] and B [m, q] as they are used."""
        layer = self.layers[name]
        return layer.lora_A[self.adapter].weight.data, layer.lora_B[self.adapter].weight.data

    def hook(self, name: str, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Around the forward of A."""
        linear = self.layers[name].lora_A[self.adapter]
        self.hooks += [
            linear.register_forward_pre_hook(before),
            linear.register_forward_hook(after),
        ]

    def device(self, name: str) -> torch.device:
        return self.layers[name].lora_A[self.adapter].weight.device

    def products(self, name: str) -> torch.dtype:
        """What activations are multiplied in."""
        wide = self.layers[name].lora_A[self.adapter].weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    def undo(self) -> None:
        """The model as it was; nothing where that was done."""
        if not self.undone:
            for hook in self.hooks:
                hook.remove()
            self.before.restore()
            self.undone = True


def _longer(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


@dataclass(eq=False)
class _Before:
    """What injecting changes: layers of PEFT's and their active adapters, what is trained, who is
    called by which name."""

    model: nn.Module
    tuner: Any
    adapter: str
    layers: list[tuple[Any, list[str], bool]]
    wrappers: list[tuple[Any, bool]]
    trained: list[tuple[nn.Parameter, bool]]
    children: dict[str, nn.Module]
    attributes: dict[str, Any]
    targeted: list[str] | None

    @classmethod
    def of(cls, peft: Any, model: Any, tuner: Any, adapter: str) -> _Before:
        inner = tuner.model if tuner is not None else model
        layer, wrapper = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
        modules = dict(inner.named_modules())
        targeted = getattr(tuner, "targeted_module_names", None)
        return cls(
            inner,
            tuner,
            adapter,
            [
                (x, list(x.active_adapters), x.disable_adapters)
                for x in modules.values()
                if isinstance(x, layer)
            ],
            [(x, x.disable_adapters) for x in modules.values() if isinstance(x, wrapper)],
            [(x, x.requires_grad) for x in inner.parameters()],
            modules,
            dict(vars(inner)),
            None if targeted is None else list(targeted),
        )

    def activate(self, layers: Iterable[Any]) -> None:
        """Nothing but the adapter, in all layers, and nothing is trained that was not."""
        for layer in (*(x for x, _, _ in self.layers), *layers):
            layer.set_adapter([self.adapter])
            if layer.disable_adapters:
                layer.enable_adapters(True)
        for wrapper, disabled in self.wrappers:
            if not disabled:
                wrapper.enable_adapters(False)
        self._train()

    def restore(self) -> None:
        for name, module in [*self.model.named_modules()]:
            before = self.children.get(name)
            if name and before is not None and module is not before:
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, before)
        for layer, active, disabled in self.layers:
            layer.set_adapter(active)  # first: PEFT warns of an active one that goes
            layer.delete_adapter(self.adapter)
            if disabled:
                layer.enable_adapters(False)
        for wrapper, disabled in self.wrappers:
            wrapper.enable_adapters(not disabled)
        if self.tuner is not None:
            self.tuner.peft_config.pop(self.adapter, None)
            if self.targeted is not None:
                self.tuner.targeted_module_names[:] = self.targeted
        configs = getattr(self.model, "peft_config", None)
        if isinstance(configs, dict):
            configs.pop(self.adapter, None)
        for name in vars(self.model).keys() - self.attributes.keys():
            delattr(self.model, name)
        self._train()

    def _train(self) -> None:
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.tuners_utils
        import peft.utils
    except ImportError as error:
        raise DomergeError(f"a live model needs PEFT ({error}); pip install peft") from error
    return peft


def _tuner(peft: Any, model: Any) -> Any:
    """PEFT's own model of adapters around the model, None where there is none."""
    model = unwrapped(model)
    if isinstance(model, peft.PeftModel):
        model = unwrapped(model.base_model)
    if isinstance(model, peft.LoraModel):
        return model
    if isinstance(model, peft.tuners.tuners_utils.BaseTuner) or not isinstance(model, nn.Module):
        problem = f"a {type(model).__name__} has no LoRA adapters"
        raise OptionError("model", problem, "give a model of torch, or a PeftModel with LoRA")
    return None


def _check(peft: Any, model: nn.Module, adapter: str, names: Sequence[str]) -> None:
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        problem = f"{adapter!r} cannot be the name of a module"
        raise OptionError("adapter", problem, "give a word without dots")
    if adapter in getattr(model, "peft_config", {}):
        raise OptionError("adapter", f"the model has {adapter!r} already", "give another name")
    modules = dict(model.named_modules())
    if missing := [name for name in names if name not in modules]:
        problem = f"it has no module {some(missing)}"
        remedy = "give the model that the adapters were trained on"
        raise OptionError("model", problem, remedy)
    for name, module in modules.items():
        if getattr(module, "merged_adapters", None):
            problem = f"adapters are merged into {name!r}"
            raise OptionError("model", problem, "unmerge them first (unmerge_adapter)")
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            problem = f"{name!r} drops activations out in training mode"
            raise OptionError("model", problem, "call its eval() first")


def _inject(peft: Any, model: nn.Module, tuner: Any, adapter: str, names: Sequence[str]) -> None:
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        inference_mode=True,
        target_modules="|".join(map(re.escape, names)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tuner is None:
            peft.inject_adapter_in_model(config, model, adapter, low_cpu_mem_usage=True)
        else:
            tuner.peft_config[adapter] = config
            tuner.inject_adapter(model, adapter, low_cpu_mem_usage=True)


def _check_layers(layers: Mapping[str, Any], adapter: str) -> None:
    for name, layer in layers.items():
        own = dict(getattr(layer, "lora_A", nn.ModuleDict()).items())
        if not isinstance(own.get(adapter), nn.Linear):
            kind = type(getattr(layer, "base_layer", layer)).__name__
            problem = f"{name!r} is a {kind}, no linear layer"
            raise OptionError("model", problem, "save the merge, and load it with PEFT")

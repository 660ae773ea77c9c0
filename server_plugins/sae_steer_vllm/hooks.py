"""Sites as forward hooks on vLLM's modules: what they call is traced into the compiled graph."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sae_steer.errors import SiteError
from sae_steer.sites import Kind, Place, Site
from sae_steer_vllm.families import locate
from sae_steer_vllm.op import edit_site


def install(model: nn.Module, site: Site, name: str) -> bool:
    """Hooks a site into a model.

    Args:
        model: vLLM's model.
        site: The site.
        name: What the op is called with.

    Returns:
        Whether the site is in this process; False where another stage of a pipeline has it.

    Raises:
        SiteError: The model has no such place, or a site's two places are in different stages.
    """
    reader, _ = locate(model, site.read)
    writer, _ = locate(model, site.write)
    if (reader is None) != (writer is None):
        raise SiteError(f"{site}: its two places are in different stages of the pipeline. Move the split.")
    if reader is None:
        return False
    if site.read == site.write:
        _tap(model, site.write, lambda y, residual: edit_site(y, name, residual=residual))
        return True
    kept: list[Tensor] = []

    def keep(x: Tensor, residual: Tensor | None) -> None:
        # The fused norms add the residual in place: what was read must be taken now.
        kept[:] = [x + residual if residual is not None else x.clone()]

    def edit(y: Tensor, residual: Tensor | None) -> None:
        edit_site(y, name, read=kept.pop())

    _tap(model, site.read, keep)
    _tap(model, site.write, edit)
    return True


def listen(model: nn.Module, place: Place, act: Callable[[Tensor, Tensor | None], None]) -> bool:
    """Calls ``act(x, residual)`` in every eager forward pass, for as long as the model lives.

    Returns:
        Whether the place is in this process; False where another stage of a pipeline has it.

    Raises:
        SiteError: The model has no such place.
    """
    if locate(model, place)[0] is None:
        return False
    _tap(model, place, act)
    return True


def _tap(model: nn.Module, place: Place, act: Callable[[Tensor, Tensor | None], None]) -> None:
    """Calls ``act(x, residual)`` on the tensor at a place; ``residual`` is None where the tensor is whole."""
    module, side = locate(model, place)
    assert module is not None  # the caller asked
    if place.kind is Kind.RESID_PRE:
        _tap_entry(module, act)
        return

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        act(args[0], args[1] if place.kind is Kind.RESID_MID and len(args) > 1 else None)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            act(output, None)
        else:
            act(output[0], output[1] if place.kind is Kind.RESID_POST else None)

    if side == "input":
        module.register_forward_pre_hook(before)
    else:
        module.register_forward_hook(after)


def _tap_entry(layer: nn.Module, act: Callable[[Tensor, Tensor | None], None]) -> None:
    """:func:`_tap` on what enters a layer, among the arguments of a signature that differs from family to family."""
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise SiteError(f"vLLM's {type(layer).__name__} has no argument 'hidden_states'.")
    hidden = names.index("hidden_states")
    residual = names.index("residual") if "residual" in names else len(names)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[hidden] if hidden < len(args) else kwargs["hidden_states"]
        x = torch.clone(x)  # what enters the first layer is not the model's own where it was given embeddings
        act(x, args[residual] if residual < len(args) else kwargs.get("residual"))
        if hidden < len(args):
            return (*args[:hidden], x, *args[hidden + 1 :]), kwargs
        return args, kwargs | {"hidden_states": x}

    layer.register_forward_pre_hook(before, with_kwargs=True)

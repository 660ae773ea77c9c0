"""Edit layers as Hugging Face forward hooks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sae_steer.edit_layer import EditLayer, refuse_gradients
from sae_steer.families import locate
from sae_steer.sites import Kind, Place


def install(model: PreTrainedModel, layer: EditLayer) -> list[RemovableHandle]:
    """Hooks an edit layer into a model.

    Returns:
        The handles that take it out again.

    Raises:
        SiteError: The model has no such place.
    """
    site = layer.site
    if site.read == site.write:
        return [_tap(model, site.write, lambda y: layer(y), layer)]
    # A transcoder reads one tensor and writes another, later one.
    kept: list[Tensor] = []

    def keep(x: Tensor) -> None:
        kept[:] = [x]

    def edit(y: Tensor) -> None:
        layer(y, read=kept.pop())

    for place in (site.read, site.write):
        locate(model, place)  # both, before either is hooked
    return [_tap(model, site.read, keep, layer), _tap(model, site.write, edit, layer)]


def _tap(model: PreTrainedModel, place: Place, act: Callable[[Tensor], None], layer: EditLayer) -> RemovableHandle:
    """Calls ``act`` on the tensor at a place, in every forward pass in which the layer has work."""
    module, side = locate(model, place)
    # The tensor that enters a layer may be the caller's own (``inputs_embeds``): edit a copy of it. Everywhere else the
    # tensor is the model's own, and between attention and MLP it must be edited where it is, since the residual
    # connection around the MLP has already taken it.
    copies = place.kind is Kind.RESID_PRE

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not layer.armed:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        refuse_gradients(x)
        if not copies:
            act(x)
            return None
        x = x.clone()
        act(x)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if not layer.armed:
            return
        y = output if isinstance(output, Tensor) else output[0]
        refuse_gradients(y)
        act(y)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)

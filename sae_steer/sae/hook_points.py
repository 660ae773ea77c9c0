"""Places by the module paths of Hugging Face models, such as ``model.layers.12.self_attn.o_proj.input``."""

import re

from sae_steer.errors import SiteError
from sae_steer.sites import Kind, Place

_MODULE = re.compile(
    r"(?:model\.|language_model\.|transformer\.|gpt_neox\.)*(?:layers|h)\.(?P<layer>\d{1,5})(?P<rest>.*)"
)
# Of modules in a layer, in the families of models that have them. What `mlp` and the attention put out is left out: it
# is what they add to the residual stream in most families, and in some another norm comes between.
_PLACES = {
    ".output": Kind.RESID_POST,
    "": Kind.RESID_POST,
    ".input": Kind.RESID_PRE,
    ".self_attn.o_proj.input": Kind.Z,
    ".pre_feedforward_layernorm.output": Kind.MLP_IN,
    ".mlp.input": Kind.MLP_IN,
    ".post_feedforward_layernorm.output": Kind.MLP_OUT,
}


def place_of_module(path: str) -> Place:
    """Reads the path of a module, with the side of it where it says one; raises :class:`SiteError` for others."""
    match = _MODULE.fullmatch(path)
    if match is None or match["rest"] not in _PLACES:
        known = ", ".join(rest or "nothing" for rest in _PLACES)
        raise SiteError(f"The hook point {path!r} is not one this program knows. Known after 'layers.L': {known}.")
    return Place(_PLACES[match["rest"]], int(match["layer"]))

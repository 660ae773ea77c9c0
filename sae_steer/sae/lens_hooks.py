"""The site of a checkpoint that names TransformerLens hooks."""

from sae_steer.errors import SiteError
from sae_steer.sites import Site


def lens_site(hook: str | None, out: str | None = None) -> tuple[Site | None, tuple[str, ...]]:
    """The site of a hook name; None, and a note that says why, where the user has to name it.

    Args:
        hook: Where the SAE reads; None = the files do not say.
        out: Where it writes, where that is another place.
    """
    if hook is None:
        return None, ("the files do not say where the SAE belongs: name its site",)
    for name in (hook, out):
        if name is not None and name.endswith("hook_normalized"):
            return None, (
                f"{name} is taken before the norm's gain, which a model here has already applied: name the site only "
                "where that gain is 1, or was folded into the encoder",
            )
    try:
        return Site.from_transformer_lens(hook, None if out == hook else out), ()
    except SiteError as error:
        return None, (f"{error.message} Name the site.",)

"""Everything of vLLM that the plugin touches; nothing outside of this package imports it.

The plugin has no fork and no subclass of vLLM's own: it wraps the functions of :mod:`..ledger`, each for the reason
given there, and hands over to files that know nothing of vLLM. A wrapper adds to a call and never replaces it, and does
nothing in an engine whose configuration does not name the plugin.

:mod:`.scheduler` is what happens in the engine, :mod:`.frontend` what happens before and after it, :mod:`.runner` what
happens beside the model, :mod:`.calibration` what a calibration asks; :mod:`.versions` says which vLLM and which
configuration it is, and :mod:`.install` puts the wrappers in.
"""

from sae_steer_vllm.compat.install import register

__all__ = ["register"]

"""SAE checkpoints: one canonical record, and one reader for each family of files."""

from sae_steer.sae.labels import FeatureLabel as FeatureLabel
from sae_steer.sae.labels import Labels as Labels
from sae_steer.sae.open import open_sae as open_sae
from sae_steer.sae.record import Activation as Activation
from sae_steer.sae.record import FeatureRows as FeatureRows
from sae_steer.sae.record import InputNorm as InputNorm
from sae_steer.sae.record import Sae as Sae
from sae_steer.sae.record import SaeSpec as SaeSpec

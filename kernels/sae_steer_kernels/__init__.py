"""Ops of sae-steer: each with a literal reference, an implementation per device, and tolerances with reasons.

Shape letters: ``T`` tokens in a step, ``D`` model width, ``F`` features, ``S`` slots, ``K`` edited features in a slot,
``B`` bins of a gain table.
"""

from sae_steer_kernels.feature_edit import FEATURE_EDIT as FEATURE_EDIT
from sae_steer_kernels.feature_edit import EditBuffers as EditBuffers
from sae_steer_kernels.feature_edit import EditTable as EditTable
from sae_steer_kernels.feature_edit import feature_edit as feature_edit
from sae_steer_kernels.feature_edit.layout import Act as Act
from sae_steer_kernels.feature_edit.layout import Flag as Flag
from sae_steer_kernels.feature_edit.layout import Norm as Norm
from sae_steer_kernels.feature_edit.layout import RowFloat as RowFloat
from sae_steer_kernels.feature_edit.layout import RowInt as RowInt
from sae_steer_kernels.feature_edit.layout import SlotFloat as SlotFloat
from sae_steer_kernels.feature_edit.layout import SlotInt as SlotInt
from sae_steer_kernels.reconstruct import reconstruct as reconstruct
from sae_steer_kernels.topk_rank import topk_rank as topk_rank
from sae_steer_kernels.warm_up import warm_up as warm_up

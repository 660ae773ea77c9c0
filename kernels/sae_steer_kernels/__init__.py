"""Ops of sae-steer: each with a literal reference, an implementation per device, and tolerances with reasons.

Shape letters: ``T`` tokens in a step, ``D`` model width, ``F`` features, ``S`` slots, ``K`` edited features in a slot,
``B`` bins of a gain table.
"""

from sae_steer_kernels._regions import traced as traced
from sae_steer_kernels.feature_edit import FEATURE_EDIT as FEATURE_EDIT
from sae_steer_kernels.feature_edit import EditBuffers as EditBuffers
from sae_steer_kernels.feature_edit import EditTable as EditTable
from sae_steer_kernels.feature_edit import SmallEdits as SmallEdits
from sae_steer_kernels.feature_edit import feature_edit as feature_edit
from sae_steer_kernels.feature_edit import scratch_floats as scratch_floats
from sae_steer_kernels.feature_edit import small_edits as small_edits
from sae_steer_kernels.feature_edit.grouping import TokenGroups as TokenGroups
from sae_steer_kernels.feature_edit.layout import Act as Act
from sae_steer_kernels.feature_edit.layout import Flag as Flag
from sae_steer_kernels.feature_edit.layout import Norm as Norm
from sae_steer_kernels.feature_edit.layout import RowFloat as RowFloat
from sae_steer_kernels.feature_edit.layout import RowInt as RowInt
from sae_steer_kernels.feature_edit.layout import SlotFloat as SlotFloat
from sae_steer_kernels.feature_edit.layout import SlotInt as SlotInt
from sae_steer_kernels.lay_out import LAY_OUT as LAY_OUT
from sae_steer_kernels.lay_out import BucketTokens as BucketTokens
from sae_steer_kernels.lay_out import StepTokens as StepTokens
from sae_steer_kernels.reconstruct import RECONSTRUCT as RECONSTRUCT
from sae_steer_kernels.reconstruct import DropScratch as DropScratch
from sae_steer_kernels.reconstruct import reconstruct as reconstruct
from sae_steer_kernels.sparse_decode import SPARSE_DECODE as SPARSE_DECODE
from sae_steer_kernels.sparse_decode import sparse_decode as sparse_decode
from sae_steer_kernels.topk_rank import TOPK_RANK as TOPK_RANK
from sae_steer_kernels.topk_rank import RankBuffers as RankBuffers
from sae_steer_kernels.topk_rank import topk_rank as topk_rank
from sae_steer_kernels.topk_readout import TOPK_READOUT as TOPK_READOUT
from sae_steer_kernels.topk_readout import ReadoutBuffers as ReadoutBuffers
from sae_steer_kernels.topk_readout import topk_readout as topk_readout
from sae_steer_kernels.warm_up import warm_up as warm_up

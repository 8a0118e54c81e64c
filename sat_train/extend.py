"""Classes that an extension computes with, in files that `build=` names (`docs/extend_reference.md`)."""

from sat_train.data.clips.bad_clip import BadClip as BadClip
from sat_train.data.fields.pictures import read_aligned as read_aligned
from sat_train.data.fields.reader import FieldReader as FieldReader
from sat_train.data.fields.reader import SampleGeometry as SampleGeometry
from sat_train.diffusion.timesteps import sampling_timesteps as sampling_timesteps
from sat_train.encoding.conditions.condition import Condition as Condition
from sat_train.encoding.conditions.condition import DitInputs as DitInputs
from sat_train.models.adapter import Adapter as Adapter
from sat_train.models.dit.initialization import zero_ as zero_
from sat_train.models.dit.mixin import Mixin as Mixin
from sat_train.models.dit.positions import PositionEmbedding as PositionEmbedding
from sat_train.models.dit.rotary import RotaryPositions as RotaryPositions
from sat_train.models.dit.stack import BlockStack as BlockStack
from sat_train.objective.loss_inputs import LossInputs as LossInputs
from sat_train.objective.loss_term import LossTerm as LossTerm
from sat_train.objective.noising import NoiseLaw as NoiseLaw
from sat_train.objective.validation_view import ValidationView as ValidationView
from sat_train.training.loop.callback import Callback as Callback
from sat_train.training.loop.metrics import TrainMetrics as TrainMetrics

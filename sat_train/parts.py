"""The names that an extension imports to register parts; torch-free (`docs/extend_reference.md`)."""

from sat_train.config.parts.adapter_parts import AdapterParams as AdapterParams
from sat_train.config.parts.adapter_parts import AdapterTensor as AdapterTensor
from sat_train.config.parts.adapter_parts import LoraParams as LoraParams
from sat_train.config.parts.callback_parts import CallbackParams as CallbackParams
from sat_train.config.parts.condition_parts import ConditionParams as ConditionParams
from sat_train.config.parts.field_parts import FieldParams as FieldParams
from sat_train.config.parts.field_parts import NumbersParams as NumbersParams
from sat_train.config.parts.field_parts import TimedParams as TimedParams
from sat_train.config.parts.guidance_parts import GuidanceParams as GuidanceParams
from sat_train.config.parts.loss_term_parts import LossTermParams as LossTermParams
from sat_train.config.parts.module_parts import ModuleParams as ModuleParams
from sat_train.config.parts.noise_parts import NoiseParams as NoiseParams
from sat_train.config.parts.optimizer_parts import OptimizerParams as OptimizerParams
from sat_train.config.parts.position_parts import PositionParams as PositionParams
from sat_train.config.parts.position_parts import (
    Rotary3DPositionEmbeddingParams as Rotary3DPositionEmbeddingParams,
)
from sat_train.config.parts.reference import ConditionName as ConditionName
from sat_train.config.parts.reference import FieldName as FieldName
from sat_train.config.parts.reference import Kinds as Kinds
from sat_train.config.parts.reference import ModuleName as ModuleName
from sat_train.config.parts.reference import WeightsFile as WeightsFile
from sat_train.config.parts.registry import Field as Field
from sat_train.config.parts.registry import Params as Params
from sat_train.config.parts.registry import part as part
from sat_train.config.parts.sampler_parts import SamplerParams as SamplerParams
from sat_train.config.parts.timestep_parts import TimestepsParams as TimestepsParams
from sat_train.config.parts.view_parts import ViewParams as ViewParams
from sat_train.config.rule import rule

guard_rail = rule

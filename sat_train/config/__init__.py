"""YAML in, one frozen and validated RunConfig out. Imports neither torch nor sat."""

from sat_train.config.geometry import Geometry as Geometry
from sat_train.config.loading import load_run_config as load_run_config
from sat_train.config.model_spec import ModelSpec as ModelSpec
from sat_train.config.network_spec import NetworkSpec as NetworkSpec
from sat_train.config.run import RunConfig as RunConfig
from sat_train.config.schema.args import ArgsConfig as ArgsConfig
from sat_train.config.schema.deepspeed import DeepSpeedConfig as DeepSpeedConfig
from sat_train.config.words import split_command_line as split_command_line

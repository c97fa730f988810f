"""The schema of a recipe: every key, its type, its default and the one line that `--help` shows; a module per section.

Paths are relative to the folder the command runs in. Defaults follow RerankVPR's published code where it works; a line
says where they differ and why.
"""

from configs.schema.data import DataConfig
from configs.schema.engine import EngineConfig
from configs.schema.eval import EncodingConfig, EvalConfig, RerankConfig
from configs.schema.loss import Argument, LossConfig
from configs.schema.memory import MemoryConfig
from configs.schema.model import ModelConfig
from configs.schema.optim import OptimConfig
from configs.schema.recipe import Recipe
from configs.schema.section import ANY_NAME, NonNegative, Positive, Section, registered, with_home
from configs.schema.tracking import TrackingConfig
from configs.schema.trainer import TrainerConfig

__all__ = [
    "ANY_NAME",
    "Argument",
    "DataConfig",
    "EncodingConfig",
    "EngineConfig",
    "EvalConfig",
    "LossConfig",
    "MemoryConfig",
    "ModelConfig",
    "NonNegative",
    "OptimConfig",
    "Positive",
    "Recipe",
    "RerankConfig",
    "Section",
    "TrackingConfig",
    "TrainerConfig",
    "registered",
    "with_home",
]

"""gspmd: compiler-style sharding for JAX that you can read, explain, simulate and run."""

from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.errors import (
    ArgumentError,
    GspmdError,
    MeshError,
    RuleError,
    SpecError,
    StrictError,
    TraceError,
)
from gspmd.plan import Collective, Plan, plan
from gspmd.rules.factor import register_rule

__all__ = [
    "ArgumentError",
    "Collective",
    "GspmdError",
    "MeshError",
    "P",
    "Plan",
    "RuleError",
    "SpecError",
    "StrictError",
    "TraceError",
    "annotate",
    "plan",
    "register_rule",
]

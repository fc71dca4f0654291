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
from gspmd.partition import Finding
from gspmd.partitioned import Partitioned, partition
from gspmd.plan import Collective, Plan, plan
from gspmd.rules.factor import register_rule

__all__ = [
    "ArgumentError",
    "Collective",
    "Finding",
    "GspmdError",
    "MeshError",
    "P",
    "Partitioned",
    "Plan",
    "RuleError",
    "SpecError",
    "StrictError",
    "TraceError",
    "annotate",
    "partition",
    "plan",
    "register_rule",
]

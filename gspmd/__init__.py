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
from gspmd.findings import Finding
from gspmd.options import Options
from gspmd.partitioned import Partitioned, partition
from gspmd.pipeline import pipeline
from gspmd.plan import Collective, Plan
from gspmd.planner import plan
from gspmd.reshard import ReshardPlan, reshard_plan
from gspmd.rules.register import register_rule
from gspmd.stages import (
    PipelineError,
    from_microbatches,
    run_layers,
    stack_stages,
    to_microbatches,
)
from gspmd.uneven import Uneven

__all__ = [
    "ArgumentError",
    "Collective",
    "Finding",
    "GspmdError",
    "MeshError",
    "Options",
    "P",
    "Partitioned",
    "PipelineError",
    "Plan",
    "ReshardPlan",
    "RuleError",
    "SpecError",
    "StrictError",
    "TraceError",
    "Uneven",
    "annotate",
    "from_microbatches",
    "partition",
    "pipeline",
    "plan",
    "register_rule",
    "reshard_plan",
    "run_layers",
    "stack_stages",
    "to_microbatches",
]

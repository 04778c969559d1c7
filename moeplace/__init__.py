"""Expert placement for Mixture-of-Experts serving: balance time, not tokens, and prove it.

Start with `Problem`, `solve` and `evaluate`; the command line is ``moeplace --help``.
"""

__version__ = "0.1.0"

from moeplace import instances
from moeplace.batches import Batches, over_batches
from moeplace.bounds import Bound, lower_bound, recompute
from moeplace.compare import compare
from moeplace.constraints import (
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.diagnose import Finding, diagnose
from moeplace.errors import (
    CertificateError,
    FormatError,
    MissingExtraError,
    MoeplaceError,
    PlanError,
    PolicyNotApplicable,
    ProblemError,
    SolverError,
)
from moeplace.evaluate import Evaluation, evaluate
from moeplace.expert_bytes import expert_bytes
from moeplace.formats import read_loads, read_plan, write_plan
from moeplace.hardware import Cluster
from moeplace.instances import read_instance, write_instance
from moeplace.latency import Planes, Table
from moeplace.loads import LoadHistogram
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.result import Limits, Progress, Result, Status
from moeplace.search.split import resplit
from moeplace.solve import solve

__all__ = [
    "EMPTY",
    "Batches",
    "Bound",
    "CertificateError",
    "Cluster",
    "Evaluation",
    "Finding",
    "Forbid",
    "FormatError",
    "Limits",
    "LoadHistogram",
    "MaxMoves",
    "MaxReplicas",
    "MissingExtraError",
    "MoeplaceError",
    "NodeGroups",
    "Pin",
    "Plan",
    "PlanError",
    "Planes",
    "PolicyNotApplicable",
    "Problem",
    "ProblemError",
    "Progress",
    "ReplicaBudget",
    "Result",
    "SolverError",
    "Status",
    "Table",
    "TokenCapacity",
    "compare",
    "diagnose",
    "evaluate",
    "expert_bytes",
    "instances",
    "lower_bound",
    "over_batches",
    "read_instance",
    "read_loads",
    "read_plan",
    "recompute",
    "resplit",
    "solve",
    "write_instance",
    "write_plan",
]

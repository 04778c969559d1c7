"""Expert placement for Mixture-of-Experts serving: balance time, not tokens, and prove it.

Start with `Problem`, `solve` and `evaluate`; the command line is ``moeplace --help``.
"""

__version__ = "0.1.0"

from moeplace import instances
from moeplace.affinity import coactivation, gather
from moeplace.batches import Batches, over_batches
from moeplace.bounds import lower_bound, recompute
from moeplace.claims import Bound
from moeplace.compare import compare
from moeplace.constraints import (
    Forbid,
    MaxMoves,
    MaxOffNode,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.diagnose import Finding, diagnose
from moeplace.dispatch import waterfill
from moeplace.drift import Decision, Monitor
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
from moeplace.migrate import migrate, relabel
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.replan import Economy, Proposal, propose
from moeplace.requests import Profiles, Requests
from moeplace.result import Limits, Progress, Result, Status
from moeplace.search.fill import fill
from moeplace.search.split import resplit
from moeplace.service import Service, Slo
from moeplace.simulate import Engine, goodput, simulate
from moeplace.solve import solve
from moeplace.topology import rank_plans, trace_traffic, traffic
from moeplace.tradeoff import tradeoff
from moeplace.transfer import Links, Migration, Payback, payback
from moeplace.whatif import whatif

__all__ = [
    "EMPTY",
    "Batches",
    "Bound",
    "CertificateError",
    "Cluster",
    "Decision",
    "Economy",
    "Engine",
    "Evaluation",
    "Finding",
    "Forbid",
    "FormatError",
    "Limits",
    "Links",
    "LoadHistogram",
    "MaxMoves",
    "MaxOffNode",
    "MaxReplicas",
    "Migration",
    "MissingExtraError",
    "MoeplaceError",
    "Monitor",
    "NodeGroups",
    "Payback",
    "Pin",
    "Plan",
    "PlanError",
    "Planes",
    "PolicyNotApplicable",
    "Problem",
    "ProblemError",
    "Profiles",
    "Progress",
    "Proposal",
    "ReplicaBudget",
    "Requests",
    "Result",
    "Service",
    "Slo",
    "SolverError",
    "Status",
    "Table",
    "TokenCapacity",
    "coactivation",
    "compare",
    "diagnose",
    "evaluate",
    "expert_bytes",
    "fill",
    "gather",
    "goodput",
    "instances",
    "lower_bound",
    "migrate",
    "over_batches",
    "payback",
    "propose",
    "rank_plans",
    "read_instance",
    "read_loads",
    "read_plan",
    "recompute",
    "relabel",
    "resplit",
    "simulate",
    "solve",
    "trace_traffic",
    "tradeoff",
    "traffic",
    "waterfill",
    "whatif",
    "write_instance",
    "write_plan",
]

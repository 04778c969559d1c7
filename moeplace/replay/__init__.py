"""Run plans on real ranks: a torch MoE layer under expert parallelism, timed rank by rank.

`replay_plans` runs plans side by side, `calibrate_ranks` measures how fast each rank is and
writes a profile. Both start their ranks themselves, or are one of the ranks under torchrun.
torch is imported in this package only, by the modules that need it:

===========  ==========================================================================
`settings`   what the ranks run and on what; the estimate of memory
`routing`    which experts each token goes to: a trace, or drawn from a histogram
`kernels`    grouped expert SwiGLU; how a slow rank is emulated
`layer`      the expert-parallel layer: exchange, experts, exchange back, combination
`world`      one rank among others: process groups, agreement on errors, timers
`launch`     ranks as processes of this machine, never outliving their parent
`measure`    plans interleaved round by round, on every rank
`report`     what was measured beside what was predicted
`calibrate`  the grid of points that a profile holds
===========  ==========================================================================
"""

from moeplace.replay.calibrate import calibrate_ranks
from moeplace.replay.measure import replay_plans
from moeplace.replay.report import Report
from moeplace.replay.routing import TokenRouting, draw_routing, read_trace
from moeplace.replay.settings import Runtime

__all__ = [
    "Report",
    "Runtime",
    "TokenRouting",
    "calibrate_ranks",
    "draw_routing",
    "read_trace",
    "replay_plans",
]

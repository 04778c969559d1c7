"""The exceptions of moeplace.

::

    MoeplaceError
    ├── ProblemError (ValueError)        loads, cluster, options or constraints break a rule
    │   └── PolicyNotApplicable          a policy cannot be used on this problem (shown as n/a)
    ├── PlanError (ValueError)           a plan breaks a rule, or does not fit the problem
    ├── FormatError (ValueError)         a file is not what it should be
    ├── SolverError                      a solver contradicts our own evaluation
    ├── CertificateError                 a claimed bound could not be recomputed
    ├── ReplayError                      a run on devices failed, or these cannot make it
    └── MissingExtraError (ImportError)  an optional dependency is not installed

Every message says what is wrong, which rule it breaks, the value, the place and the remedy.
"""


class MoeplaceError(Exception):
    """Base of every exception that moeplace raises on purpose."""


class ProblemError(MoeplaceError, ValueError):
    """Loads, cluster, options or constraints break a rule."""


class PolicyNotApplicable(ProblemError):  # noqa: N818 - a state, not a fault: tables show it as n/a
    """A policy cannot be used on this problem, e.g. EPLB on unequal slots."""


class PlanError(MoeplaceError, ValueError):
    """A plan breaks a rule or does not fit the problem."""


class FormatError(MoeplaceError, ValueError):
    """A file cannot be read as what it should be, or cannot be written."""


class SolverError(MoeplaceError):
    """A solver's claim contradicts our own evaluation."""


class CertificateError(MoeplaceError):
    """A claimed bound could not be recomputed from the problem."""


class ReplayError(MoeplaceError):
    """A replay or calibration failed, or these ranks cannot run it."""


class MissingExtraError(MoeplaceError, ImportError):
    """An optional dependency is not installed."""

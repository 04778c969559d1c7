"""Files of plans and loads, one module for each format; here the table of plan formats.

A format of plans is a module with ``read(path, ...) -> Plan`` and ``write(plan, path, ...)``, and
the names of the options that they take: ``READS``, ``WRITES`` and ``NEEDS``.
"""

from types import ModuleType
from typing import Any

from moeplace._files import PathLike
from moeplace.errors import FormatError, PlanError, ProblemError
from moeplace.formats import deepseek, omni, own, sglang, tensorrt_llm, vllm, vllm_ascend
from moeplace.formats.loads import read_loads
from moeplace.plan import Plan

__all__ = ["PLAN_FORMATS", "options", "read_loads", "read_plan", "write_plan"]

PLAN_FORMATS: dict[str, ModuleType] = {
    "deepseek": deepseek,
    "moeplace": own,
    "omni": omni,
    "sglang": sglang,
    "tensorrt-llm": tensorrt_llm,
    "vllm": vllm,
    "vllm-ascend": vllm_ascend,
}


def read_plan(
    path: PathLike,
    format: str = "moeplace",  # noqa: A002 - reads as it is said
    *,
    ranks: int | None = None,
    layers: int | None = None,
    slots: int | None = None,
    first_moe_layer: int | None = None,
) -> Plan:
    """Read a plan from our file or an engine's, and check it.

    Parameters
    ----------
    path : path
    format : {"deepseek", "moeplace", "omni", "sglang", "tensorrt-llm", "vllm", "vllm-ascend"}
    ranks : int
        EP ranks that share the slots; deepseek, sglang, tensorrt-llm, vllm: their files do not
        say it.
    layers : int, optional
        MoE layers; vllm: how many, where one row stands for all.
    slots : int, optional
        Slots of each rank; omni: by default the most experts that a rank holds in a layer.
    first_moe_layer : int
        Model layers before the first MoE layer; sglang: their rows are passed over.

    Returns
    -------
    Plan
        Without shares (engines store none). Two replicas of one expert on a rank, as engines'
        own balancers make them, are kept: such a plan can be priced.

    Raises
    ------
    FormatError
        If the format is unknown or does not take an option, or the file cannot be read, is not of
        that format or holds a plan that breaks a rule, e.g. misses an expert.
    PlanError
        If one of our own files is sound but its plan breaks a rule.
    """
    given = {"ranks": ranks, "layers": layers, "slots": slots, "first_moe_layer": first_moe_layer}
    module = _format(format)
    plan: Plan = module.read(path, **_options(format, given, reading=True))
    return plan


def write_plan(
    plan: Plan,
    path: PathLike,
    format: str = "moeplace",  # noqa: A002
    *,
    first_moe_layer: int | None = None,
    num_layers: int | None = None,
    mtp_layers: int | None = None,
    form: str | None = None,
    drop_split: bool = False,
) -> None:
    """Write a plan to our file or an engine's, whole or not at all.

    Parameters
    ----------
    plan : Plan
    path : path
        Its folder must exist; a file that is there is replaced.
    format : {"deepseek", "moeplace", "omni", "sglang", "tensorrt-llm", "vllm", "vllm-ascend"}
    first_moe_layer : int
        The model layer of the plan's first layer, 0 if all layers are MoE (DeepSeek-V3: 3);
        sglang, tensorrt-llm.
    num_layers : int, optional
        The model's number of layers, MTP layers included where they have rows: to check that the
        plan covers them all; sglang, tensorrt-llm.
    mtp_layers : int, optional
        Layers of multi-token prediction after the plan's, which the plan does not cover: slot p
        gets expert p mod experts; tensorrt-llm.
    form : {"map", "row", "expert-to-rank"}, optional
        Which of the pull requests' forms; vllm.
    drop_split : bool
        Write a plan with shares to an engine's file, which has no place for them: the engine will
        share by its own rule, and the plan will not cost what it was priced at.

    Raises
    ------
    FormatError
        If the format is unknown, does not take an option or lacks one, or the file cannot be
        written.
    PlanError
        If `plan` is not a Plan, or the format cannot hold it: layer, rank, expert and rule are
        named, and nothing is repaired.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"Only a Plan can be written, got {type(plan).__name__}: pass its plan.")
    given = {
        "first_moe_layer": first_moe_layer,
        "num_layers": num_layers,
        "mtp_layers": mtp_layers,
        "form": form,
    }
    module = _format(format)
    chosen = _options(format, given, reading=False)
    if module is not own and plan.split is not None and not drop_split:
        raise PlanError(
            f"Plan stores shares (weighted routing), and the format {format} has no place for "
            "them: the engine would share by its own rule. Plan for that rule, or drop the shares "
            "knowingly (drop_split=True)."
        )
    module.write(plan, path, **chosen)


def options(format: str, *, reading: bool) -> frozenset[str]:  # noqa: A002
    """The options that a format takes when it is read or written."""
    module = _format(format)
    found: frozenset[str] = module.READS if reading else module.WRITES
    return found


def _options(name: str, given: dict[str, Any], *, reading: bool) -> dict[str, Any]:
    known = options(name, reading=reading)
    chosen = {option: value for option, value in given.items() if value is not None}
    for option, value in chosen.items():
        if option not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes none"
            doing = "reading" if reading else "writing"
            raise FormatError(
                f"Option {option} is not one of the format {name}, which {takes} when {doing}. "
                "Drop it."
            )
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 1 if option in ("ranks", "layers", "slots", "num_layers") else 0
        if option != "form" and not (whole and least <= value <= 1 << 16):
            raise ProblemError(
                f"Option {option} must be a whole number from {least} to {1 << 16}, got {value!r}."
            )
    for option in _format(name).NEEDS & known:
        if option not in chosen:
            raise FormatError(
                f"The format {name} needs the option {option}: its rows are model layers, dense "
                "ones included. Give 0 if every layer is MoE, 3 for DeepSeek-V3."
            )
    return chosen


def _format(name: str) -> ModuleType:
    if name not in PLAN_FORMATS:
        raise FormatError(
            f"Plan format {name!r} is unknown: choose one of {', '.join(sorted(PLAN_FORMATS))}."
        )
    return PLAN_FORMATS[name]

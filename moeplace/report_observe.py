"""A report on an observe folder: what the policies inside an engine would have done, and why."""

import html
from pathlib import Path

import numpy as np

from moeplace import figures
from moeplace._files import PathLike
from moeplace.compare import printable
from moeplace.integrations.observe import Decision, model_folder, read_decisions
from moeplace.report_page import Page, Section, Table, layer_filter


def report_observed(folder: PathLike) -> str:
    """The report on one model's recorded decisions, as HTML.

    Raises
    ------
    FormatError
        If the folder holds none, several models', or a file of another layout.
    MissingExtraError
        If plotly is not installed.
    """
    figures.plotly()
    place = model_folder(folder)
    told = list(read_decisions(place))
    page = Page(f"Observed decisions: {printable(Path(place).name)}")
    page.sections += [_decisions(page, told), _last(page, told[-1])]
    return page.html("", layer_filter(told[-1].weight.shape[0]))


def saving(decision: Decision) -> float:
    """Share of the step time that the proposed plan was predicted to save."""
    before = float(decision.before.sum())
    return 1 - float(decision.after.sum()) / before if before > 0 else 0.0


def _decisions(page: Page, told: list[Decision]) -> Section:
    predicted = np.array([saving(each) for each in told])
    moved = np.array([int(each.copies.sum()) for each in told])
    answer = (
        f"{len(told):,} decisions: predicted saving of the MoE layers' time {predicted.mean():.2%} "
        f"on average, {predicted[-1]:.2%} at the last; {moved.mean():,.0f} copies each. "
        "Predictions, not measurements."
    )
    figure = figures.plotly().Figure()
    figure.add_scatter(
        x=np.arange(1, len(told) + 1), y=predicted, customdata=moved, mode="lines+markers",
        line={"color": figures.BLUE},
        hovertemplate="decision %{x}: %{y:.2%} saved for %{customdata:,} copies<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=figures.axis("decision"),
        yaxis=figures.axis("predicted saving", tickformat=".1%", rangemode="tozero"),
    )
    rows = [
        (str(number), *(printable(str(each.about.get(key, ""))) for key in ("time", "verdict")),
         f"{share:.2%}", f"{copies:,}", printable(str(each.about.get("reason", ""))))
        for number, (each, share, copies) in enumerate(
            zip(told, predicted.tolist(), moved.tolist(), strict=True), start=1)
    ]  # fmt: skip
    body = page.plot(
        "saving",
        figures.dressed(figure, height=320),
        f"Predicted saving of each decision. {answer}",
        "Saving predicted from the loads that the engine counted, by the speeds it was given.",
        Table(
            caption="Decisions",
            heads=("number", "time", "verdict", "predicted saving", "copies", "reason"),
            rows=rows,
        ),
    )
    return Section(anchor="decisions", title="What was decided, and why?",
                   answer=html.escape(answer), body=body)  # fmt: skip


def _last(page: Page, last: Decision) -> Section:
    costs = {"before": last.before, "proposed": last.after}
    answer = (
        f"At the last decision the slowest ranks' times sum to {last.before.sum():.6g} before and "
        f"{last.after.sum():.6g} after, of at least {last.bound.sum():.6g} (proven); tokens over "
        f"relative speed. {int(last.copies.sum()):,} copies would move."
    )
    layers = range(last.weight.shape[0])
    body = page.plot(
        "costs",
        figures.layer_bounds(costs, last.bound, unit="token units"),
        f"Slowest rank of each layer before and after, against the bound. {answer}",
        "Above: grey bars are proven bounds. Below: gaps to them.",
        Table(
            caption="Layers at the last decision",
            heads=("layer", "before", "proposed", "bound", "copies"),
            rows=[(str(i), f"{last.before[i]:.6g}", f"{last.after[i]:.6g}", f"{last.bound[i]:.6g}",
                   str(int(last.copies[i]))) for i in layers],
            layers=True,
        ),
        layers="xaxis",
    )  # fmt: skip
    body += page.plot(
        "loads",
        figures.load_curve(last.weight),
        "Lorenz curves of the loads that the engine counted",
        "The further a curve is above the dotted line, the less even the load.",
        Table(
            caption="Loads at the last decision",
            heads=("layer", "tokens", "busiest expert"),
            rows=[(str(i), f"{last.weight[i].sum():,.6g}", str(int(last.weight[i].argmax())))
                  for i in layers],
            layers=True,
        ),
    )  # fmt: skip
    return Section(anchor="last", title="What would the last decision change?",
                   answer=html.escape(answer), body=body)  # fmt: skip

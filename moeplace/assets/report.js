"use strict";
(() => {
  const stored = (name) => JSON.parse(document.getElementById("data-" + name).textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const config = {
    responsive: true, displaylogo: false, scrollZoom: false, displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d"],
  };
  const own = document.getElementById("own-scale");
  const from = document.getElementById("from"), to = document.getElementById("to");

  const drawn = (plot) => {
    const figure = stored(plot.dataset.figure);
    const narrow = plot.clientWidth < 520;
    if (narrow) {
      figure.layout.margin = { ...figure.layout.margin, l: 50, r: Math.min(112, figure.layout.margin.r) };
      figure.layout.font.size = 11;
    }
    if (own?.checked && figure.layout.coloraxis) {
      delete figure.layout.coloraxis.cmin;
      delete figure.layout.coloraxis.cmax;
    }
    return Plotly.react(plot, figure.data, figure.layout, config);
  };

  // Layers that are shown: axes of figures that have layers, and rows of tables.
  const range = (axis, low, high) =>
    axis.startsWith("yaxis") ? [high + 0.5, low - 0.5] : [low - 0.5, high + 0.5];
  const filter = (plot, low, high) => {
    const change = {};
    for (const axis of (plot.dataset.layers || "").split(" ").filter(Boolean))
      change[axis + ".range"] = range(axis, low, high);
    return Object.keys(change).length ? Plotly.relayout(plot, change) : null;
  };
  const chosen = () => {
    const last = Number(to.max);
    const clamp = (input, otherwise) =>
      input.value === "" ? otherwise : Math.min(Math.max(Math.round(Number(input.value)), 0), last);
    const ends = [clamp(from, 0), clamp(to, last)];
    return [Math.min(...ends), Math.max(...ends)];
  };
  const refilter = () => {
    const [low, high] = chosen();
    plots.forEach((plot) => filter(plot, low, high));
    document.querySelectorAll("tr[data-layer]").forEach((row) => {
      const layer = Number(row.dataset.layer);
      row.hidden = layer < low || layer > high;
    });
    document.getElementById("shown").textContent = "layers " + low + " to " + high + " shown";
  };

  for (const plot of plots) drawn(plot);
  if (from) {
    from.addEventListener("change", refilter);
    to.addEventListener("change", refilter);
    document.getElementById("all").addEventListener("click", () => {
      from.value = 0;
      to.value = to.max;
      refilter();
    });
  }
  document.querySelectorAll("select[data-plot]").forEach((select) =>
    select.addEventListener("change", () => {
      const plot = document.getElementById(select.dataset.plot);
      plot.dataset.figure = select.value;
      plot.setAttribute("aria-label", "Heat map of rank times: " + select.selectedOptions[0].text);
      drawn(plot);
      filter(plot, ...chosen());
    }));
  own?.addEventListener("change", () =>
    plots.filter((plot) => plot.closest(".pair")).forEach((plot) => {
      drawn(plot);
      filter(plot, ...chosen());
    }));
  // Paper is narrower than screens, and figures are drawn, not flowed.
  addEventListener("beforeprint", () =>
    plots.forEach((plot) =>
      Plotly.relayout(plot, { width: plot.closest(".pair") ? 330 : 680, autosize: false })));
  addEventListener("afterprint", () =>
    plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
  document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
  document.documentElement.dataset.ready = "yes";
})();

"use strict";
// Draws every .chart from the JSON block it names, in the colours of the page's theme.
(() => {
  const config = {
    responsive: true, displaylogo: false, typesetMath: false, showTips: false, modeBarButtons: [["toImage", "resetScale2d"]],
  };

  const themed = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const result = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: color("--muted") },
      hoverlabel: {
        align: "left", bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--ink") },
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--ink") },
    };
    for (const name of ["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))]) {
      const lines = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--line") };
      const own = layout[name] || {};
      const title = own.title ? { title: { ...own.title, font: { size: 12.5 } } } : {};
      result[name] = { ...lines, ...own, ...title };
    }
    return result;
  };

  const draw = (chart) => {
    const figure = JSON.parse(document.getElementById(chart.dataset.figure).textContent);
    Plotly.react(chart, figure.data, themed(figure.layout), config);
  };

  const charts = [...document.querySelectorAll(".chart")];
  charts.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
  document.addEventListener("change", (event) => {
    const input = event.target.closest("input[data-chart]");
    if (!input) return;
    const chart = document.getElementById(input.dataset.chart);
    chart.dataset.figure = input.value;
    draw(chart);
  });
})();

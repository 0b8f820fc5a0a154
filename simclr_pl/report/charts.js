"use strict";
// Curves, drawn by uPlot: one chart for each key, all runs in it.
{
  const charts = [];
  const shown = DATA.runs.map(() => true);
  let smoothing = 0;
  let isLogarithmic = false;

  /** Exponential moving average, corrected for its start; null where there is no number. */
  function smoothed(values) {
    let mean = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      mean = smoothing * mean + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return mean / weight;
    });
  }

  function nearest(values, from) {
    for (let d = 0; d < values.length; d += 1) {
      for (const i of [from - d, from + d]) {
        if (values[i] !== null && values[i] !== undefined) return i;
      }
    }
    return null;
  }

  class Chart {
    constructor(element) {
      this.element = element;
      this.key = element.dataset.key;
      const { about, series } = DATA.charts[this.key];
      this.series = series;
      const notes = [...new Set(series.flatMap((s) => s.notes))].join("; ");
      this.last = make("span", { className: "last" });
      this.tip = make("div", { className: "tip", hidden: true });
      this.plot = make("div", { className: "plot", tabIndex: 0, attributes: { role: "img" } });
      const head = make("div", { className: "head" },
        make("h4", { textContent: this.key.slice(this.key.indexOf("/") + 1) }), this.last);
      const line = [about, notes].filter(Boolean).join(" · ");
      element.append(head, make("p", { className: "about", textContent: line }), this.plot, this.tip);
      const tables = series.map((s) => [s.steps, s.values]);
      this.table = tables.length > 1 ? uPlot.join(tables) : tables[0];
      this.isPositive = series.every((s) => s.values.every((v) => v > 0));
      if (series.length === 1) this.last.textContent = number(series[0].values.at(-1));
      const ends = series.map((s) => {
        const name = DATA.runs.length > 1 ? `${DATA.runs[s.run].name}: ` : "";
        const range = `from ${number(Math.min(...s.values))} to ${number(Math.max(...s.values))}`;
        return `${name}last ${number(s.values.at(-1))}, ${range}`;
      });
      this.plot.setAttribute("aria-label", `${this.key} over the steps. ${ends.join(". ")}. Left and right arrows read values.`);
      this.plot.addEventListener("keydown", (event) => this.press(event));
      this.plot.addEventListener("blur", () => this.leave());
      this.width = 0;
      new ResizeObserver(() => this.fit()).observe(this.plot);
    }

    fit() {
      const width = Math.floor(this.plot.clientWidth);
      if (!width || width === this.width) return;
      this.width = width;
      if (this.chart) this.chart.setSize({ width, height: 172 });
      else this.draw();
    }

    /** Raw values faint and smoothed ones over them, or raw ones alone. */
    draw() {
      if (!this.width) return;
      this.chart?.destroy();
      const columns = this.table.slice(1);
      const runs = this.series.map((s) => DATA.runs[s.run].colour);
      const ink = runs.map((place) => colour(`run-${place}`));
      const isSmooth = smoothing > 0;
      const line = (i, isFaint) => ({
        stroke: isFaint ? ink[i].replace("rgb(", "rgba(").replace(")", ", 0.28)") : ink[i],
        width: isFaint ? 1 : 1.75,
        spanGaps: true,
        show: shown[this.series[i].run],
        points: { show: columns[i].filter((v) => v !== null && v !== undefined).length < 25, size: 5, fill: ink[i] },
      });
      const series = [{}, ...columns.map((_, i) => line(i, isSmooth))];
      const data = [this.table[0], ...columns];
      if (isSmooth) {
        columns.forEach((values, i) => {
          series.push({ ...line(i, false), points: { show: false } });
          data.push(smoothed(values));
        });
      }
      const axis = { stroke: colour("soft"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "11.5px system-ui, sans-serif" };
      const steps = this.table[0];
      this.chart = new uPlot({
        width: this.width,
        height: 172,
        legend: { show: false },
        padding: [8, 8, 0, 0],
        cursor: { y: false, drag: { x: true, y: false }, sync: { key: "steps" }, points: { size: 7 } },
        scales: {
          x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
          y: isLogarithmic && this.isPositive ? { distr: 3 } : {},
        },
        axes: [
          { ...axis, size: 26, gap: 4, values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? compact(t) : "")) },
          { ...axis, size: 50, gap: 4, values: (u, ticks) => ticks.map((t) => (t === null ? "" : compact(t))) },
        ],
        series,
        hooks: { setCursor: [() => this.tell()] },
      }, data, this.plot);
      this.steps = steps;
    }

    tell() {
      const { left, idx } = this.chart.cursor;
      const isOwn = this.plot.matches(":hover, :focus");
      if (!isOwn || idx === null || idx === undefined || left < 0) {
        this.tip.hidden = true;
        return;
      }
      const lines = [make("div", { textContent: `step ${this.steps[idx].toLocaleString("en")}` })];
      this.series.forEach((s, i) => {
        if (!shown[s.run]) return;
        const at = nearest(this.table[i + 1], idx);
        const row = make("div", {}, make("span", { className: "swatch", style: { background: `var(--run-${DATA.runs[s.run].colour})` } }));
        const value = at === null ? "–" : number(this.table[i + 1][at]);
        const smooth = smoothing ? ` (smoothed ${number(this.chart.data[i + 1 + this.series.length][at])})` : "";
        const name = DATA.runs.length > 1 ? ` ${DATA.runs[s.run].name}` : "";
        row.append(`${value}${smooth}${name}`);
        lines.push(row);
      });
      this.tip.replaceChildren(...lines);
      this.tip.hidden = false;
      const room = this.element.clientWidth - this.tip.offsetWidth - 6;
      const x = this.plot.offsetLeft + 50 + left + 12;
      this.tip.style.left = `${Math.max(6, x > room ? Math.min(room, x - this.tip.offsetWidth - 26) : x)}px`;
      this.tip.style.top = `${this.plot.offsetTop + 6}px`;
    }

    press(event) {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined || !this.chart) return;
      event.preventDefault();
      const most = this.steps.length - 1;
      const from = this.chart.cursor.idx ?? (by < 0 ? most + 1 : -1);
      const to = Math.min(most, Math.max(0, from + by));
      this.chart.setCursor({ left: this.chart.valToPos(this.steps[to], "x"), top: 20 });
      this.tell();
    }

    leave() {
      this.chart?.setCursor({ left: -10, top: -10 });
      this.tip.hidden = true;
    }
  }

  function compact(value) {
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });
    if (size && size < 1e-3) return value.toExponential(0);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  }

  for (const element of document.querySelectorAll(".chart")) charts.push(new Chart(element));
  const again = () => charts.forEach((chart) => chart.draw());
  whenRecoloured.push(again);

  document.getElementById("smoothing")?.addEventListener("input", ({ target }) => {
    smoothing = Number(target.value);
    document.querySelector("output[for=smoothing]").textContent = target.value;
    again();
  });
  document.getElementById("logarithmic")?.addEventListener("click", ({ target }) => {
    isLogarithmic = !isLogarithmic;
    target.setAttribute("aria-pressed", isLogarithmic);
    again();
  });
  const legend = document.getElementById("runs");
  DATA.runs.forEach((run, i) => {
    const button = make("button", { type: "button", attributes: { "aria-pressed": "true" } },
      make("span", { className: "swatch", style: { background: `var(--run-${run.colour})` } }), run.name);
    button.addEventListener("click", () => {
      shown[i] = !shown[i];
      button.setAttribute("aria-pressed", shown[i]);
      again();
    });
    legend?.append(button);
  });
}

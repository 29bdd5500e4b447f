"use strict";
// The charts. Each takes the runs to show and says in a note which it could not show and why.

const PALETTE = ["#4c7fd6", "#e58a2f", "#2fa58d", "#d4536a", "#9270c9", "#b3971f", "#3aa6d8", "#cf73b2", "#7a9a34"];
const OTHERS = "#8d96a1";
const X_AXES = {
  usd: { title: "dollars, all in", missing: "no price", prefix: "$" },
  tokens: { title: "tokens", missing: "no count of tokens" },
  flops: { title: "FLOPs", missing: "no count of FLOPs" },
  seconds: { title: "seconds since the start", missing: "no clock" },
  steps: { title: "steps", missing: "no steps" },
};
const Y_AXES = {
  train_loss: "training loss, nats a token",
  val_loss: "validation loss, nats a token",
  val_bits_per_byte: "validation, bits per byte",
};
const LOADS = {
  max_violation: "fullest expert over the mean, less one",
  load_entropy: "entropy of the load, 1 where all are equal",
  dead_experts: "experts without a token",
};

// Dollars are written out: those of a CPU's run are thousandths, and nobody counts in micro-dollars.
const USD = "$,.4~r";
const IN_USD = { tickprefix: "$", exponentformat: "none" };
const IN_SI = { exponentformat: "SI" };

const colourOf = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isNarrow = () => window.matchMedia("(max-width: 820px)").matches;

function draw(id, traces, layout) {
  const line = colourOf("--line");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const narrow = isNarrow();
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colourOf("--text"), size: narrow ? 11 : 12, family: "system-ui, sans-serif" },
    margin: { l: 56, r: 12, t: 12, b: 40 },
    hovermode: "closest",
    hoverlabel: { bgcolor: colourOf("--card"), bordercolor: line, font: { color: colourOf("--text") }, align: "left" },
    legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colourOf("--quiet"), activecolor: colourOf("--accent") },
    dragmode: narrow ? false : "zoom", // a finger scrolls the page
    ...layout,
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
  // Only these buttons: left to itself plotly offers to share the chart on a server of its own.
  const config = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const div = document.getElementById(id);
  if (!traces.some(trace => trace.x.length)) {
    full.annotations = [{ text: "nothing to show", showarrow: false, x: 0.5, y: 0.5, xref: "paper", yref: "paper" }];
    Object.assign(full.xaxis, { visible: false });
    Object.assign(full.yaxis, { visible: false });
  }
  // Zoomed as it is while the axes stay the same.
  full.uirevision = JSON.stringify([full.xaxis.title, full.xaxis.type, full.yaxis.title, full.yaxis.type]);
  const first = !div.data;
  Plotly.react(div, traces, full, config);
  if (first) {
    div.on("plotly_click", event => {
      const run = event.points[0].customdata;
      if (typeof run === "string") select(run);
    });
  }
}

// One line for many runs of a colour, with a gap between each two: as fast as one.
function joined(runs, pointsOf, style) {
  const trace = { type: "scatter", mode: "lines", x: [], y: [], text: [], customdata: [], connectgaps: false, ...style };
  for (const run of runs) {
    const points = pointsOf(run);
    const label = plain(shortened(run.folder, 60));
    for (let i = 0; i < points.y.length; i++) {
      trace.x.push(points.x[i]); trace.y.push(points.y[i]); trace.text.push(label); trace.customdata.push(run.folder);
    }
    trace.x.push(null); trace.y.push(null); trace.text.push(""); trace.customdata.push(null);
  }
  return trace;
}

// Groups in turn, a handful of runs at a time: else the last colour would cover all others where runs are many.
const RUNS_IN_TURN = 15;

function interleaved(groups, traceOf) {
  const turns = Math.max(0, ...groups.map(group => Math.ceil(group.runs.length / RUNS_IN_TURN)));
  return Array.from({ length: turns }, (_, turn) => groups.flatMap(group => {
    const runs = group.runs.slice(turn * RUNS_IN_TURN, (turn + 1) * RUNS_IN_TURN);
    const name = plain(group.label);
    return runs.length ? [{ ...traceOf(runs, group), name, legendgroup: name, showlegend: turn === 0 }] : [];
  })).flat();
}

function drawLoss(runs, state) {
  const axis = X_AXES[state.x];
  const noCurve = runs.filter(run => !run.curves[state.y]);
  const noAxis = runs.filter(run => run.curves[state.y] && !run.curves[state.y][state.x]);
  const shown = runs.filter(run => run.curves[state.y] && run.curves[state.y][state.x]);
  const points = run => ({ x: run.curves[state.y][state.x], y: run.curves[state.y].y });
  // Of few evaluations a line alone would show nothing.
  const mode = state.y === "train_loss" ? "lines" : "lines+markers";
  const hover = `%{text}<br>${axis.prefix ? `%{x:${USD}}` : `%{x:.4~s} ${state.x}`}<br>%{y:.4f}`;
  const traces = interleaved(groupsOf(shown, state.colour), (some, group) => joined(some, points, {
    mode, hovertemplate: `${hover}<extra>${plain(group.label)}</extra>`,
    line: { color: group.colour, width: shown.length > 40 ? 1 : 1.6 }, marker: { size: 5, color: group.colour },
    opacity: state.selected && shown.some(run => run.folder === state.selected) ? 0.3 : shown.length > 40 ? 0.7 : 1,
  }));
  for (const run of shown.filter(run => run.folder === state.selected)) {
    traces.push(joined([run], points, { mode, name: `<b>${plain(shortened(run.folder))}</b>`, showlegend: true,
      hovertemplate: `${hover}<extra></extra>`, line: { color: colourOf("--text"), width: 2.6 }, marker: { size: 6 } }));
  }
  draw("loss", traces, {
    xaxis: { title: { text: axis.title }, type: state.logX ? "log" : "linear", ...(axis.prefix ? IN_USD : IN_SI) },
    yaxis: { title: { text: Y_AXES[state.y] }, type: state.logY ? "log" : "linear" },
  });
  const notes = [];
  if (noCurve.length) notes.push(`${noCurve.length} of ${runs.length} runs have no ${Y_AXES[state.y].split(",")[0]}`);
  if (noAxis.length) notes.push(`${noAxis.length} have ${axis.missing}, so no place on this axis`);
  if (state.logX && shown.some(run => run.curves[state.y][state.x].some(x => x !== null && x <= 0))) {
    notes.push("points at zero have no place on a log axis");
  }
  notes.push(`A run of more than ${content.max_points} logged points is drawn with the first, the last and the lowest ` +
    "and highest of each stretch; none is averaged. Click a line to see its run");
  note("loss-note", notes);
}

function drawGroups(side, runs, state) {
  const key = state[`group${side.toUpperCase()}`];
  const order = valuesOf(key).map(value => value.label);
  const missing = [];
  const panels = [[`usd-${side}`, state.cost, COSTS[state.cost], USD, IN_USD],
    [`speed-${side}`, "tokens_per_second", "tokens/s", ",.4~r", IN_SI]];
  for (const [id, figure, title, form, ticks] of panels) {
    const known = runs.filter(run => run.figures[figure] !== null);
    if (known.length < runs.length) missing.push(`${runs.length - known.length} of ${runs.length} runs have no ${title}`);
    const byHardware = new Map();
    for (const run of known) {
      const hardware = run.hardware ?? "unknown hardware";
      if (!byHardware.has(hardware)) byHardware.set(hardware, []);
      byHardware.get(hardware).push(run);
    }
    const names = [...byHardware.keys()].sort();
    const present = new Set(known.map(run => labelOf(run, key)));
    draw(id, names.map((hardware, index) => {
      const own = byHardware.get(hardware);
      const colour = index < PALETTE.length ? PALETTE[index] : OTHERS;
      return {
        type: "box", boxpoints: "all", jitter: 0.5, pointpos: 0, name: plain(hardware), line: { color: colour, width: 1.2 },
        fillcolor: "rgba(128,128,128,0.08)", marker: { color: colour, size: 5, opacity: 0.75 }, showlegend: true,
        x: own.map(run => plain(shortened(labelOf(run, key), 24))), y: own.map(run => run.figures[figure]),
        text: own.map(run => plain(shortened(run.folder, 60))), customdata: own.map(run => run.folder),
        hoveron: "points", hovertemplate: `%{text}<br>%{x}<br>%{y:${form}}<extra>${plain(hardware)}</extra>`,
      };
    }), {
      boxmode: "group",
      xaxis: { type: "category", categoryorder: "array",
        categoryarray: order.filter(label => present.has(label)).map(label => plain(shortened(label, 24))) },
      yaxis: { title: { text: title }, type: state.logGroups ? "log" : "linear",
        rangemode: "tozero", ...ticks },
    });
  }
  note(`note-${side}`, [...missing, "A point is a run, a box holds the middle half of them. Dollars and seconds of " +
    "different hardware or prices do not compare"]);
}

const COSTS = {
  usd_per_million_tokens: "dollars per million tokens", // of the training steps
  usd_per_million_tokens_all_in: "dollars per million, all in",
};

function drawLoad(runs, state) {
  const shown = runs.filter(run => run.load && run.load.over_time[state.load].some(layer => layer.some(v => v !== null)));
  const last = layer => layer.findLast(value => value !== null) ?? null;
  const points = run => ({ x: run.load.layers, y: run.load.over_time[state.load].map(last) });
  const traces = interleaved(groupsOf(shown, state.colour), (some, group) => joined(some, points, {
    mode: "lines+markers", line: { color: group.colour, width: 1 },
    marker: { color: group.colour, size: 6 }, opacity: shown.length > 40 ? 0.5 : 0.9,
    hovertemplate: `%{text}<br>layer %{x}: %{y:.3f}<extra>${plain(group.label)}</extra>`,
  }));
  const layers = { title: { text: "layer with experts" }, dtick: shown.some(run => run.load.layers.length > 12) ? undefined : 1 };
  const single = shown.every(run => run.load.layers.length === 1);
  draw("layers", traces, { xaxis: { ...layers, ...(single ? { range: [-0.6, 0.6] } : {}) },
    yaxis: { title: { text: state.load.replace("_", " ") }, rangemode: "tozero" } });
  const run = shown.find(each => each.folder === state.selected) ?? shown[0];
  const over = run && run.load.tokens.some(value => value !== null) ? "tokens" : "steps";
  draw("load-over-time", run ? [{
    type: "heatmap", x: run.load[over], y: run.load.layers, z: run.load.over_time[state.load],
    colorscale: state.load === "load_entropy" ? "Cividis" : "Viridis", colorbar: { thickness: 12, len: 1 },
    hovertemplate: `layer %{y}, %{x:.3s} ${over}: %{z:.3f}<extra></extra>`,
  }] : [], {
    title: run ? { text: plain(shortened(run.folder, isNarrow() ? 36 : 60)), font: { size: 12 }, y: 0.98 } : undefined,
    margin: { l: 56, r: 12, t: 34, b: 40 },
    xaxis: { title: { text: over }, ...IN_SI }, yaxis: { ...layers, zeroline: false },
  });
  const absent = runs.length - shown.length;
  note("load-note", [...(absent ? [`${absent} of ${runs.length} runs have no experts, or logged no load`] : []),
    "Left: at the last logged step, layers counted among those with experts. Right: one run over its training; click a " +
    "run anywhere to see its own"]);
}

function drawSpent(spending) {
  draw("spent", spending.lines.map((line, index) => ({
    type: "scatter", mode: "lines", x: line.at, y: line.usd, name: plain(shortened(line.sweep)), showlegend: true,
    line: { shape: "hv", color: index < PALETTE.length ? PALETTE[index] : OTHERS, width: 1.8 },
    hovertemplate: `${plain(line.sweep)}<br>%{x}<br>%{y:${USD}}<extra></extra>`,
  })), { xaxis: { title: { text: "time, UTC" }, type: "date" },
    yaxis: { title: { text: "dollars so far" }, rangemode: "tozero", ...IN_USD } });
}

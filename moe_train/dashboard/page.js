"use strict";
// What is chosen on the page, and what follows: filters, colours, the run looked at, the theme, fresh data.

let content = JSON.parse(document.getElementById("data").textContent);
const state = {
  x: content.runs.some(run => run.figures.usd !== null) ? "usd" : "tokens", y: "train_loss", logX: false, logY: false,
  colour: "precision", groupA: "precision", groupB: "experts", cost: "usd_per_million_tokens", logGroups: false,
  load: "max_violation", filters: new Map(), selected: null,
  sort: "bits per byte a dollar", descending: true, search: "", rows: ROWS_AT_ONCE,
};
const at = id => document.getElementById(id);
const note = (id, sentences) => { at(id).textContent = sentences.map(sentence => `${sentence}.`).join(" "); };
const list = (id, items) => at(id).replaceChildren(...items.map(item => element("li", {}, item)));

// ---------------------------------------------------------------- keys: some of a run's own, and all of its settings
const OWN_KEYS = { precision: "precision", experts: "number of experts", hardware: "hardware", status: "status" };
const NEVER_ALIKE = ["run_dir", "config_hash", "name"]; // to filter by, but no groups
let labels = new Map(); // key -> values {label, count}, in order

function labelOf(run, key) {
  if (key in OWN_KEYS) return String(run[key] ?? "not known");
  const index = settingIndex.get(key);
  if (index === undefined || run.settings[index] < 0) return "none";
  return content.settings[index].values[run.settings[index]];
}

let settingIndex = new Map();
function learnKeys() {
  settingIndex = new Map(content.settings.map((setting, index) => [setting.key, index]));
  labels = new Map();
}

// Numbers by size, before words in their own order.
function valuesOf(key) {
  if (!labels.has(key)) {
    const counts = new Map();
    for (const run of content.runs) counts.set(labelOf(run, key), (counts.get(labelOf(run, key)) ?? 0) + 1);
    const numeric = label => label.trim() !== "" && Number.isFinite(Number(label));
    labels.set(key, [...counts].map(([label, count]) => ({ label, count })).sort((a, b) => {
      if (numeric(a.label) !== numeric(b.label)) return numeric(a.label) ? -1 : 1;
      return numeric(a.label) ? Number(a.label) - Number(b.label) : a.label.localeCompare(b.label, "en", { numeric: true });
    }));
  }
  return labels.get(key);
}

// Runs by the value of a key, colours being those of the value whatever is filtered; beyond nine values one grey rest.
function groupsOf(runs, key) {
  const values = valuesOf(key);
  const ranked = [...values].sort((a, b) => b.count - a.count).slice(0, PALETTE.length).map(value => value.label);
  const kept = values.map(value => value.label).filter(label => ranked.includes(label));
  const groups = kept.map((label, index) => ({ label, colour: PALETTE[index], runs: [] }));
  const rest = { label: `${values.length - kept.length} other values`, colour: OTHERS, runs: [] };
  for (const run of runs) (groups[kept.indexOf(labelOf(run, key))] ?? rest).runs.push(run);
  return [...groups, rest].filter(group => group.runs.length);
}

// --------------------------------------------------------------------------------------------------------- filters
function passes(run) {
  for (const [key, filter] of state.filters) {
    const label = labelOf(run, key);
    if (filter.chosen.size && !filter.chosen.has(label)) return false;
    if (filter.from !== null && !(Number(label) >= filter.from)) return false;
    if (filter.to !== null && !(Number(label) <= filter.to)) return false;
  }
  return true;
}

function showFilters() {
  at("filter-list").replaceChildren(...[...state.filters].map(([key, filter]) => {
    const values = valuesOf(key);
    const numbers = values.filter(value => value.label.trim() !== "" && Number.isFinite(Number(value.label))).length;
    const boxes = values.map(value => element("label", {}, element("input", {
      type: "checkbox", value: value.label, checked: filter.chosen.has(value.label),
      onchange: event => { filter.chosen[event.target.checked ? "add" : "delete"](value.label); drawAll(); },
    }), ` ${shortened(value.label, 60)} (${value.count})`));
    const limit = side => element("input", { type: "number", step: "any", value: filter[side], "aria-label": `${key} ${side}`,
      onchange: event => { filter[side] = event.target.value === "" ? null : Number(event.target.value); drawAll(); } });
    return element("div", { class: "filter", "data-key": key }, element("strong", {}, OWN_KEYS[key] ?? key),
      element("button", { type: "button", "aria-label": `remove the filter by ${key}`,
        onclick: () => { state.filters.delete(key); showFilters(); drawAll(); } }, "✕"),
      ...(numbers > 4 ? [element("div", { class: "range" }, "from ", limit("from"), " to ", limit("to"))] : []),
      element("div", { class: "values" }, ...boxes));
  }));
}

// --------------------------------------------------------------------------------------------------- the run chosen
function select(folder) {
  state.selected = state.selected === folder ? null : folder;
  redraw("loss", "load", "table", "selected");
}

function showSelected() {
  const run = content.runs.find(each => each.folder === state.selected);
  at("selected").hidden = !run;
  if (!run) return;
  at("selected-name").textContent = run.folder;
  fill("selected-settings", ["setting in which runs differ", "here"], content.settings.filter(each => each.differs)
    .map(setting => ({ cells: [setting.key, labelOf(run, setting.key)] })));
  list("selected-notes", run.notes);
}

// -------------------------------------------------------------------------------------------------------- the page
function showTiles(runs) {
  const sum = name => { // of those that know it
    const known = runs.map(run => run.figures[name]).filter(value => value !== null);
    return known.length || !runs.length ? known.reduce((total, value) => total + value, 0) : null;
  };
  const best = runs.filter(run => run.figures.val_bits_per_byte !== null)
    .sort((a, b) => a.figures.val_bits_per_byte - b.figures.val_bits_per_byte)[0];
  const unpriced = runs.filter(run => run.figures.usd === null).length;
  const total = content.spending.rows[content.spending.rows.length - 1];
  const going = runs.filter(run => run.status === "running").length;
  const tiles = [
    [String(runs.length), `runs shown${going ? `, ${going} running` : ""}`],
    [asCount(sum("tokens")), "tokens trained on"],
    [asUsd(sum("usd")), `spent on them${unpriced ? `, ${unpriced} without a price` : ""}`],
    [asUsd(total.usd_total), `in the ${content.spending.ledger ? "ledger" : "runs' own accounts"}, ${total.attempts} attempts`],
    [best ? asNumber(3)(best.figures.val_bits_per_byte) : UNKNOWN,
      `lowest bits per byte${best ? `: ${shortened(best.folder, 48)}` : ""}`],
  ];
  at("tiles").replaceChildren(...tiles.map(([figure, what]) =>
    element("div", { class: "tile" }, element("b", {}, figure), element("span", {}, what))));
}

// Each choice draws anew what depends on it: all charts of hundreds of runs take a second.
const shownRuns = () => content.runs.filter(passes);
const drawing = {
  loss: () => drawLoss(shownRuns(), state),
  a: () => drawGroups("a", shownRuns(), state),
  b: () => drawGroups("b", shownRuns(), state),
  load: () => drawLoad(shownRuns(), state),
  table: () => showRuns(shownRuns(), state),
  selected: showSelected,
};
const redraw = (...parts) => parts.forEach(part => drawing[part]());

function drawAll() {
  const runs = shownRuns();
  at("shown").textContent = runs.length === content.runs.length ? "" : `${runs.length} of ${content.runs.length} runs`;
  showTiles(runs);
  redraw(...Object.keys(drawing));
}

function showMoment() {
  at("made-at").textContent = `as of ${content.made_at.replace("T", " ").replace("+00:00", " UTC")}`;
}

function drawWhole() {
  learnKeys();
  showMoment();
  offerKeys();
  showFilters();
  drawAll();
  drawSpent(content.spending);
  showLedger(content.spending);
  showClaims(content.claims);
  at("left-out").hidden = !content.left_out.length;
  list("left-out-list", content.left_out.map(each => `${each.count} folder${each.count > 1 ? "s" : ""}: ${each.reason} (${each.folders.join(", ")}` +
    `${each.count > each.folders.length ? ", …" : ""})`));
  fill("shared", ["setting", "value"], content.settings.filter(each => !each.differs)
    .map(setting => ({ cells: [setting.key, setting.values[0]] })));
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value, selected: value === chosen }, text)));
}

function offerKeys() {
  const differ = content.settings.filter(setting => setting.differs).map(setting => setting.key);
  const alike = content.settings.filter(setting => !setting.differs).map(setting => setting.key);
  const common = differ.filter(key => !NEVER_ALIKE.includes(key));
  const groups = [...Object.entries(OWN_KEYS), ...common.map(key => [key, key])];
  options(at("colour"), groups, state.colour);
  options(at("group-a"), groups, state.groupA);
  options(at("group-b"), groups, state.groupB);
  const group = (label, entries) =>
    element("optgroup", { label }, ...entries.map(([value, text]) => element("option", { value }, text)));
  at("filter-key").replaceChildren(
    element("option", { value: "" }, "choose a key …"),
    group("of runs", Object.entries(OWN_KEYS)),
    group("settings that differ", differ.map(key => [key, key])),
    group("the same in all runs", alike.map(key => [key, key])),
  );
}

// The elements, more than one where a choice is offered in several places, set `name` and draw `parts` anew.
function choose(elements, name, ...parts) {
  const property = elements[0].type === "checkbox" ? "checked" : "value";
  for (const element of elements) {
    element.addEventListener("change", () => {
      state[name] = element[property];
      for (const other of elements) other[property] = state[name];
      redraw(...parts);
    });
  }
}

function sortBy(column) {
  state.descending = state.sort === column.label ? !state.descending : Boolean(column.down);
  state.sort = column.label;
  redraw("table");
}

function setTheme(choice) {
  const dark = choice === "dark" || (choice === "auto" && window.matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function start() {
  let theme = "auto";
  try { theme = localStorage.getItem("moe_train theme") ?? "auto"; } catch { /* a browser that keeps nothing */ }
  at("theme").value = theme;
  setTheme(theme);
  at("theme").addEventListener("change", event => {
    try { localStorage.setItem("moe_train theme", event.target.value); } catch { /* then for this time only */ }
    setTheme(event.target.value);
    drawWhole();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    setTheme(at("theme").value);
    drawWhole();
  });
  window.matchMedia("(max-width: 820px)").addEventListener("change", drawWhole);

  options(at("x"), Object.entries(X_AXES).map(([key, axis]) => [key, axis.title]), state.x);
  options(at("y"), Object.entries(Y_AXES), state.y);
  options(at("load"), Object.entries(LOADS), state.load);
  const costs = [...document.querySelectorAll(".cost")];
  for (const each of costs) {
    options(each, Object.entries(COSTS).map(([key, title]) => [key, title.replace("dollars ", "")]), state.cost);
  }
  for (const [id, name] of [["x", "x"], ["y", "y"], ["log-x", "logX"], ["log-y", "logY"]]) choose([at(id)], name, "loss");
  choose([at("colour")], "colour", "loss", "load");
  choose([at("group-a")], "groupA", "a");
  choose([at("group-b")], "groupB", "b");
  choose([at("load")], "load", "load");
  choose(costs, "cost", "a", "b");
  choose([...document.querySelectorAll(".log-groups")], "logGroups", "a", "b");
  at("filter-key").addEventListener("change", event => {
    if (event.target.value && !state.filters.has(event.target.value)) {
      state.filters.set(event.target.value, { chosen: new Set(), from: null, to: null });
    }
    event.target.value = "";
    showFilters();
  });
  at("search").addEventListener("input", event => {
    Object.assign(state, { search: event.target.value, rows: ROWS_AT_ONCE });
    redraw("table");
  });
  at("more").addEventListener("click", () => { state.rows += ROWS_AT_ONCE; redraw("table"); });
  drawWhole();
  const seconds = Number(document.documentElement.dataset.refresh);
  if (seconds > 0) setInterval(refresh, 1000 * seconds);
}

// Of a served page only: new data where there is some, everything chosen staying as it is.
let asking = false, version = null;
async function refresh() {
  if (asking || document.hidden) return;
  asking = true;
  try {
    const answer = await fetch("data.json", { cache: "no-cache" });
    if (answer.headers.get("ETag") !== version) {
      content = await answer.json();
      version = answer.headers.get("ETag");
      drawWhole();
    }
    content.made_at = `${new Date().toISOString().slice(0, 19)}+00:00`;
    showMoment();
  } catch {
    at("made-at").textContent = "the server has ended; what is shown is the last it sent";
  } finally {
    asking = false;
  }
}

start();

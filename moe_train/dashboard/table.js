"use strict";
// The tables. Cells are text; the one of runs is sorted by any column and searched, unknown figures always last.

const COLUMNS = [
  { label: "run", value: run => run.folder, text: run => run.folder, wide: true },
  { label: "bits per byte a dollar", key: "bits_per_byte_a_dollar", text: asDigits, down: true },
  { label: "bits per byte", key: "val_bits_per_byte", text: asNumber() },
  { label: "val. loss", key: "val_loss", text: asNumber() },
  { label: "train loss", key: "train_loss", text: asNumber() },
  { label: "dollars", key: "usd", text: asUsd, down: true },
  { label: "$ per M tokens", key: "usd_per_million_tokens", text: asUsd },
  { label: "… all in", key: "usd_per_million_tokens_all_in", text: asUsd },
  { label: "tokens/s", key: "tokens_per_second", text: asDigits, down: true },
  { label: "MFU", key: "mfu", text: asShare, down: true },
  { label: "waits", key: "exposed_communication", text: asShare },
  { label: "tokens", key: "tokens", text: asCount, down: true },
  { label: "FLOPs", key: "flops", text: withPrefix, down: true },
  { label: "time", key: "seconds", text: asSeconds, down: true },
  { label: "active params", key: "active_params", text: asCount, down: true },
  { label: "status", value: run => run.status, text: run => run.status },
  { label: "precision", value: run => run.precision, text: run => run.precision ?? UNKNOWN },
  { label: "experts", value: run => run.experts, text: run => run.experts ?? UNKNOWN },
  { label: "hardware", value: run => run.hardware, text: run => run.hardware ?? UNKNOWN },
];
const ROWS_AT_ONCE = 200;

const valueIn = (run, column) => (column.key ? run.figures[column.key] : column.value(run)) ?? null;
const textIn = (run, column) => (column.key ? column.text(run.figures[column.key]) : column.text(run));

function sorted(runs, column, descending) {
  return [...runs].sort((one, other) => {
    const a = valueIn(one, column), b = valueIn(other, column);
    if (a === null || b === null) return (a === null) - (b === null);
    const numbers = typeof a === "number" && typeof b === "number";
    const order = numbers ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return descending ? -order : order;
  });
}

function isFound(run, search) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const own = content.settings.filter(setting => setting.differs)
    .map((setting, index) => (run.settings[index] < 0 ? "" : `${setting.key}=${setting.values[run.settings[index]]}`));
  const named = [run.folder, run.name, run.status, run.precision, run.experts, run.hardware];
  const text = [...named, ...own, ...run.notes].join(" ").toLowerCase();
  return words.every(word => text.includes(word));
}

function showRuns(runs, state) {
  const column = COLUMNS.find(each => each.label === state.sort);
  const found = sorted(runs.filter(run => isFound(run, state.search)), column, state.descending);
  const head = element("tr", {}, ...COLUMNS.map(each => element("th", {
    class: each.key ? "number" : "", "aria-sort": each === column ? (state.descending ? "descending" : "ascending") : null,
  }, element("button", { type: "button", onclick: () => sortBy(each) },
    each.label + (each === column ? (state.descending ? " ▼" : " ▲") : "")))));
  const body = element("tbody");
  for (const run of found.slice(0, state.rows)) {
    const cells = COLUMNS.map(each => element("td", { class: each.key ? "number" : each.wide ? "wide" : "" }, textIn(run, each)));
    const remarks = [...(run.status === "finished" ? [] : [run.status]), ...run.notes];
    if (remarks.length) cells[0].append(element("small", {}, remarks.join("; ")));
    body.append(element("tr", {
      tabindex: 0, class: run.folder === state.selected ? "chosen" : "", onclick: () => select(run.folder),
      onkeydown: event => { if (event.key === "Enter") select(run.folder); },
    }, ...cells));
  }
  document.getElementById("runs").replaceChildren(element("thead", {}, head), body);
  document.getElementById("found").textContent = state.search ? `${found.length} of ${runs.length} found` : "";
  const more = document.getElementById("more");
  more.hidden = found.length <= state.rows;
  more.textContent = `show ${Math.min(ROWS_AT_ONCE, found.length - state.rows)} more of ${found.length}`;
  note("runs-note", [`Bits per byte a dollar: what the model saves of the ${content.raw_bits_per_byte} bits of a raw byte, ` +
    "over all that the run cost. Early dollars save most, so compare runs of like cost"]);
}

// A table from rows of text; `numbers` says which columns are figures.
function fill(id, head, rows, numbers = []) {
  const cell = (tag, text, index) => element(tag, { class: numbers.includes(index) ? "number" : "wide" }, text);
  document.getElementById(id).replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((text, index) =>
      element("th", { class: numbers.includes(index) ? "number" : "" }, text)))),
    element("tbody", {}, ...rows.map(row => element("tr", { class: row.kind ?? "" },
      ...row.cells.map((text, index) => (text instanceof Node ? element("td", {}, text) : cell("td", text, index)))))),
  );
}

function showLedger(spending) {
  const titles = { final: "final run", tuning: "tuning", seed: "seeds", other: "no purpose stated",
    unfinished: "never finished", lost: "done again" };
  const total = spending.rows[spending.rows.length - 1];
  const kinds = Object.keys(titles).filter(kind => total.usd[kind] > 0);
  fill("ledger", ["sweep", "runs", "attempts", "device hours", ...kinds.map(kind => titles[kind]), "total"],
    spending.rows.map(row => ({ kind: row === total ? "total" : "", cells: [row.group, String(row.runs), String(row.attempts),
      asDigits(row.device_hours), ...kinds.map(kind => asUsd(row.usd[kind])), asUsd(row.usd_total)] })),
    [1, 2, 3, ...kinds.map((_, index) => index + 4), kinds.length + 4]);
  list("ledger-notes", [spending.energy_kwh === null ? "energy: not measured"
    : `energy: ${asDigits(spending.energy_kwh)} kWh where it was measured`, ...spending.notes]);
}

function showClaims(claims) {
  const text = value => (value === null || value === undefined ? UNKNOWN : typeof value === "number" ? asDigits(value)
    : typeof value === "string" ? value : JSON.stringify(value));
  const interval = value => (Array.isArray(value) && value.length === 2
    ? `${value[0] === null ? "−∞" : text(value[0])} to ${value[1] === null ? "∞" : text(value[1])}` : text(value));
  const runs = value => (Array.isArray(value) ? String(value.length) : text(value));
  fill("claims", claims.claims.length ? ["claim", "scale", "verdict", "effect", "interval", "runs", "dollars"] : [],
    claims.claims.map(claim => ({ cells: [
      claim.statement ? `${text(claim.claim)}: ${text(claim.statement)}` : text(claim.claim), text(claim.scale),
      element("span", { class: ["supported", "refuted"].includes(claim.verdict) ? claim.verdict : "" }, text(claim.verdict)),
      [text(claim.effect), claim.unit ? text(claim.unit) : ""].join(" ").trim(), interval(claim.interval), runs(claim.runs),
      typeof claim.usd === "number" ? asUsd(claim.usd) : text(claim.usd)] })), [3, 4, 5, 6]);
  note("claims-note", claims.note ? [claims.note] : []);
}

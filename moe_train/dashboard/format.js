"use strict";
// Numbers and names as text. What is not known is an en dash, never a zero.

const UNKNOWN = "–";

function known(value, write) {
  return value === null || value === undefined ? UNKNOWN : write(value);
}

// 1234567 -> 1.23M, 2.6e18 -> 2.6E (exa)
function withPrefix(value) {
  return known(value, v => {
    const steps = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
    const step = Math.min(Math.max(Math.floor(Math.log10(Math.abs(v) || 1) / 3), 0), steps.length - 1);
    return `${Number((v / 1000 ** step).toPrecision(3))}${steps[step]}`;
  });
}

// Tokens and parameters: billions are B.
const asCount = value => withPrefix(value).replace("G", "B");

const asUsd = value => known(value, v => {
  const sign = v < 0 ? "−" : "";
  const size = Math.abs(v);
  if (size >= 1) return `${sign}$${size.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  return `${sign}$${size.toLocaleString("en", { maximumSignificantDigits: 3 })}`;
});

const asNumber = (digits = 4) => value => known(value, v => v.toFixed(digits));
const asDigits = value => known(value, v => v.toLocaleString("en", { maximumSignificantDigits: 4 }));
const asShare = value => known(value, v => `${(100 * v).toFixed(1)}%`);

const asSeconds = value => known(value, v =>
  v < 120 ? `${v.toFixed(1)} s` : v < 7200 ? `${(v / 60).toFixed(1)} min` : `${(v / 3600).toFixed(1)} h`);

// Plotly takes tags and entities in its labels for formatting; names are shown as they are.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

const shortened = (text, most = 40) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// An element with attributes and children; strings become text, never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.map(child => (child instanceof Node ? child : String(child))));
  return made;
}

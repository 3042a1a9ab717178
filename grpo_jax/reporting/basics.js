"use strict";

const element = (id) => document.getElementById(id);
const parsed = new Map(); // each step's samples are parsed when they are first shown
function data(name) {
  if (!parsed.has(name)) parsed.set(name, JSON.parse(element(`data-${name}`).textContent));
  return parsed.get(name);
}
const { runs, means, config } = data("report");

// Text of models and files becomes text nodes here, and is never parsed as HTML.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(parent, tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

// Control characters, those that hide or reorder text, and halves of characters. Joiners stay: emoji and some scripts need them.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/u;

function escapeOf(character) {
  const code = character.codePointAt(0);
  return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`;
}

function addText(parent, text) {
  let plain = "";
  for (const character of String(text)) {
    if (!INVISIBLE.test(character) || character === "\t") {
      plain += character;
      continue;
    }
    parent.append(plain, make("span", { class: "escape" }, character === "\n" ? "↵" : escapeOf(character)));
    plain = character === "\n" ? "\n" : "";
  }
  parent.append(plain);
  return parent;
}

const textOf = (text) => addText(make("span"), text).textContent;

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size > 0 && size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

function options(select, labels) {
  select.replaceChildren(...labels.map((label, index) => make("option", { value: index }, textOf(label))));
}

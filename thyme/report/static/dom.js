"use strict";
// Elements, and what the server says. Text from rollouts only ever becomes text nodes: no markup is parsed anywhere.

function el(tag, options, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  fill(element, ...children);
  return element;
}

// The children in place of those that are there; what is null, undefined or false is no child.
function fill(element, ...children) {
  element.replaceChildren(...children.flat(4).filter((child) => child !== undefined && child !== null && child !== false));
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// In a report everything that a server would have answered lies in the page, by address.
const embedded = (() => {
  const element = document.getElementById("embedded");
  return element ? JSON.parse(element.textContent) : null;
})();

async function ask(address, body) {
  if (embedded) {
    if (address in embedded.answers) return embedded.answers[address];
    throw new Error(embedded.problems[address] || "not in this report");
  }
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("the server does not answer: is it still running?");
  }
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error || `the server answers ${answer.status}`);
  return said;
}

// The last answers are kept: going back costs nothing, and a file that grows is asked for under its new stamp.
class Answers {
  constructor(most) { this.most = most; this.kept = new Map(); }

  get(address, stamp = "") {
    const key = `${address}\n${stamp}`;
    let answer = this.kept.get(key);
    if (answer) this.kept.delete(key);
    else answer = ask(address).catch((error) => { this.kept.delete(key); throw error; });
    this.kept.set(key, answer);
    if (this.kept.size > this.most) this.kept.delete(this.kept.keys().next().value);
    return answer;
  }
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(digits))) : value.toExponential(1);
}

function plural(count, noun) { return `${count} ${noun}${count === 1 ? "" : "s"}`; }

"use strict";
// Python in colours: spans of text, cut by one expression.

const PYTHON = new RegExp([
  "(?<comment>#[^\\n]*)",
  "(?<string>[rbfuRBFU]{0,2}(?:\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?))",
  "(?<number>\\b(?:0[xX][0-9a-fA-F_]+|\\d[\\d_]*\\.?[\\d_]*(?:[eE][+-]?\\d+)?)\\b)",
  "(?<keyword>\\b(?:and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield|None|True|False)\\b)",
  "(?<call>\\b[A-Za-z_]\\w*(?=\\())",
].join("|"), "g");

function highlighted(code) {
  const out = document.createDocumentFragment();
  let at = 0;
  for (const match of code.matchAll(PYTHON)) {
    out.append(code.slice(at, match.index));
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    out.append(el("span", { class: `py-${kind}` }, match[0]));
    at = match.index + match[0].length;
  }
  out.append(code.slice(at));
  return out;
}

function codeBlock(code) { return el("pre", { class: "code" }, el("code", {}, highlighted(code))); }

"use strict";
// Pictures: small ones that load when they come into sight, boxes on them, and one at its full size.

function pictureAddress(run, name, size) {
  if (embedded) return embedded.pictures[name] || "";
  return `/picture/${run}/${encodeURIComponent(name)}${size ? `?size=${size}` : ""}`;
}

// `boxes`: [{box: [left, top, right, bottom] in pixels of the picture, label, how}].
function picture(run, info, { size = 480, boxes = [], caption = "" } = {}) {
  if (info.missing) return el("div", { class: "picture missing" }, `picture missing: ${info.name.slice(0, 12)}`);
  const address = pictureAddress(run, info.name, size);
  if (!address) return el("div", { class: "picture missing" }, "picture not in this report");
  const image = el("img", { loading: "lazy", decoding: "async", alt: caption || "picture" });
  image.width = info.width;
  image.height = info.height;
  image.addEventListener("error", () => {
    frame.replaceChildren(el("div", { class: "picture missing" }, `picture missing: ${info.name.slice(0, 12)}`));
  });
  image.src = address;
  const frame = el("button", {
    class: "picture", type: "button", title: "show at full size",
    onclick: () => enlarge(run, info, boxes, caption),
  }, image, boxes.map((b) => boxOn(info, b)));
  return el("figure", {}, frame, el("figcaption", {}, caption, caption ? " · " : "", `${info.width}×${info.height}`));
}

function boxOn(info, { box: [left, top, right, bottom], label, how }) {
  const share = (value, whole) => `${(100 * Math.max(0, Math.min(value, whole))) / whole}%`;
  return el("span", {
    class: `box ${how === "code" ? "said" : "found"}`,
    title: label || "",
    style: {
      left: share(left, info.width), top: share(top, info.height),
      width: share(Math.min(right, info.width) - Math.max(left, 0), info.width),
      height: share(Math.min(bottom, info.height) - Math.max(top, 0), info.height),
    },
  });
}

function enlarge(run, info, boxes, caption) {
  const close = () => dialog.remove();
  const frame = el("div", { class: "picture" },
    el("img", { src: pictureAddress(run, info.name), alt: caption || "picture" }), boxes.map((b) => boxOn(info, b)));
  const dialog = el("div", { class: "overlay", role: "dialog", onclick: close }, frame, el("p", {}, caption));
  document.body.append(dialog);
}

function closeOverlay() {
  const shown = document.querySelector(".overlay");
  if (shown) shown.remove();
  return Boolean(shown);
}

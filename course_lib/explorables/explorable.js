// What every explorable needs. `host` is the element that holds the fallback picture.
const root = host.attachShadow({ mode: "open" });
host.dataset.python = JSON.stringify(data.python); // what Python computed, for the test
root.innerHTML = `<style>
  :host { display: block; font: 16px/1.4 system-ui, sans-serif; color: #212529; background: #fff; max-width: 900px; padding: 8px; }
  label { display: inline-flex; align-items: center; gap: 6px; margin: 2px 14px 2px 0; }
  input[type=range] { width: min(420px, 70vw); }
  p { margin: 4px 0; min-height: 2.8em; }
  svg { display: block; width: 100%; }
  text { font: 14px ui-monospace, monospace; fill: #212529; }
  output { font-weight: 600; font-variant-numeric: tabular-nums; }
</style>`;
// Keys that move a slider must not turn the deck's page or reach the notebook.
for (const event of ["keydown", "keyup", "keypress"]) root.addEventListener(event, (e) => e.stopPropagation());

const SVG = Object.assign(document.createElement("template"), { innerHTML: "<svg></svg>" }).content.firstChild.namespaceURI;
const add = (parent, name, attributes = {}, text = "") => {
  const inSvg = name === "svg" || parent.namespaceURI === SVG;
  const element = inSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return parent.appendChild(element);
};
const slider = (text, low, high, value) => {
  const label = add(root, "label", {}, text);
  return add(label, "input", { type: "range", min: low, max: high, value, "aria-label": text });
};
const box = (text, checked) => {
  const label = add(root, "label");
  const input = add(label, "input", { type: "checkbox" });
  input.checked = checked;
  add(label, "span", {}, text);
  return input;
};
const drawAlways = (draw) => {
  root.addEventListener("input", draw);
  new ResizeObserver(draw).observe(host);
  draw();
};

// data: weights (64), outlier: the place of the one that the slider sets, formats: name -> levels
const { weights, outlier, formats } = data;
const names = Object.keys(formats);
const size = slider("outlier", 1, 20, 2), chosen = slider("format", 0, names.length - 1, 0), power = slider("block size", 3, 6, 6);
const svg = add(root, "svg", { role: "img", "aria-label": host.querySelector("img").alt });
const line = add(root, "p"), sum = add(root, "output");
// each value becomes its block's absmax times the nearest level
const quantize = (values, levels, block) => values.map((value, i) => {
  const first = i - (i % block), absmax = Math.max(...values.slice(first, first + block).map(Math.abs));
  const scaled = absmax ? value / absmax : 0;
  let best = 0;
  levels.forEach((level, j) => { if (Math.abs(scaled - level) < Math.abs(scaled - levels[best])) best = j; });
  return { value: levels[best] * absmax, code: best, absmax };
});

drawAlways(() => {
  const block = 2 ** Number(power.value), name = names[Number(chosen.value)], levels = formats[name];
  const values = weights.map((weight, i) => (i === outlier ? Number(size.value) : weight));
  const found = quantize(values, levels, block), others = values.map((_, i) => i).filter((i) => i !== outlier);
  const square = (list) => list.reduce((a, b) => a + b * b, 0);
  const error = Math.sqrt(square(others.map((i) => found[i].value - values[i])) / square(others.map((i) => values[i])));
  const width = Math.max(280, host.clientWidth - 16), height = 190, left = 34, wide = width - left - 4, step = wide / values.length;
  const top = Math.max(3, ...values.map(Math.abs)) * 1.05, y = (value) => (height / 2) * (1 - value / top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  for (let first = 0; first < values.length; first += block) {
    const x = left + first * step;
    if (first) add(svg, "line", { x1: x, x2: x, y1: 0, y2: height, stroke: "#adb5bd", "stroke-dasharray": "4 4" });
    for (const level of levels) {
      const at = y(level * found[first].absmax);
      add(svg, "line", { x1: x, x2: x + block * step, y1: at, y2: at, stroke: "#e3e7ea" });
    }
  }
  values.forEach((value, i) => {
    const x = left + i * step, fill = i === outlier ? "#d1495b" : "#8d99ae";
    add(svg, "rect", { x, y: Math.min(y(value), y(0)), width: Math.max(1, step - 2), height: Math.abs(y(value) - y(0)), fill });
    add(svg, "rect", { x: x - 0.5, y: y(found[i].value) - 1.5, width: Math.max(2, step - 1), height: 3, fill: "#2a9d8f" });
  });
  for (const value of [-top / 1.05, 0, top / 1.05]) {
    add(svg, "text", { x: left - 6, y: Math.min(height - 2, Math.max(12, y(value) + 5)), "text-anchor": "end" }, value.toFixed(0));
  }
  const used = new Set(others.filter((i) => found[i].absmax === found[outlier].absmax).map((i) => found[i].code)).size;
  line.textContent = `${name} in blocks of ${block}; the outlier (red) is ${size.value} standard deviations. ` +
    `The others of its block use ${used} of ${levels.length} levels. Green: what each weight becomes.`;
  sum.textContent = `error of the ${others.length} other weights: ${(100 * error).toFixed(1)} % of their size`;
  sum.dataset.value = error;
});

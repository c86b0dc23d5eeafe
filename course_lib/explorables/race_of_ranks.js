// data: matrices (names), history (steps + 1, matrices, blocks): the rank of each
const { matrices, history } = data;
const last = history.length - 1, start = Math.max(...history[0].flat());
const totals = history.map((grid) => grid.flat().reduce((a, b) => a + b, 0));
const place = slider("step", 0, last, last);
const svg = add(root, "svg", { role: "img", "aria-label": host.querySelector("img").alt });
const line = add(root, "p"), sum = add(root, "output");
// from pale yellow over green to dark blue
const stops = [[255, 255, 217], [65, 182, 196], [8, 29, 88]];
const shade = (share) => {
  const [a, b] = share < 0.5 ? [stops[0], stops[1]] : [stops[1], stops[2]], t = share < 0.5 ? 2 * share : 2 * share - 1;
  return `rgb(${a.map((from, i) => Math.round(from + t * (b[i] - from))).join()})`;
};

drawAlways(() => {
  const width = Math.max(280, host.clientWidth - 16), beside = width > 620;
  const left = 52, blocks = history[0][0].length, row = 26, grid = history[Number(place.value)];
  const heat = (beside ? width * 0.52 : width) - left - 8, cell = heat / blocks, floor = matrices.length * row;
  const x0 = beside ? width * 0.52 + 52 : 52, y0 = beside ? 8 : floor + 58, wide = width - x0 - 8, high = floor - 8;
  const height = beside ? floor + 46 : 2 * floor + 96;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  matrices.forEach((name, i) => {
    add(svg, "text", { x: left - 8, y: i * row + 18, "text-anchor": "end" }, name);
    grid[i].forEach((rank, j) => {
      const box = { x: left + j * cell, y: i * row, width: cell - 2, height: row - 2, fill: shade(rank / start) };
      add(svg, "rect", box);
      const fill = rank > 0.55 * start ? "#fff" : "#212529";
      if (cell > 18) add(svg, "text", { x: box.x + cell / 2, y: box.y + 17, "text-anchor": "middle", style: `fill: ${fill}` }, rank);
    });
  });
  for (let j = 0; j < blocks; j += Math.ceil(blocks / 10)) {
    add(svg, "text", { x: left + (j + 0.5) * cell, y: floor + 18, "text-anchor": "middle" }, j);
  }
  add(svg, "text", { x: left + heat / 2, y: floor + 38, "text-anchor": "middle" }, "block");
  const x = (step) => x0 + (wide * step) / last, y = (total) => y0 + high * (1 - total / totals[0]);
  for (const total of [0, totals[0]]) add(svg, "text", { x: x0 - 8, y: y(total) + 5, "text-anchor": "end" }, total);
  add(svg, "path", { d: `M${x0} ${y0}V${y0 + high}H${x0 + wide}`, fill: "none", stroke: "#adb5bd" });
  const path = totals.map((total, step) => `${step ? "H" : "M"}${x(step)}${step ? "V" : " "}${y(total)}`).join("");
  add(svg, "path", { d: path, fill: "none", stroke: "#2a9d8f", "stroke-width": 2.5 });
  const now = Number(place.value);
  add(svg, "circle", { cx: x(now), cy: y(totals[now]), r: 6, fill: "#d1495b" });
  add(svg, "text", { x: x0 + wide / 2, y: y0 + high + 30, "text-anchor": "middle" }, "step");
  const ranks = grid.flat();
  line.textContent = `After step ${now} the matrices have ranks from ${Math.min(...ranks)} to ${Math.max(...ranks)}; ` +
    `${ranks.filter((rank) => rank === 0).length} of ${ranks.length} have none.`;
  sum.textContent = `the budget: ${totals[now]} of ${totals[0]} ranks, ${(totals[now] / ranks.length).toFixed(1)} a matrix on average`;
  sum.dataset.value = totals[now];
});

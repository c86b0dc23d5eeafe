// data: tokens (T), surprise (T - 1) of tokens 1, 2, ..., counts (T - 1): the answer and EOS
const { tokens, surprise, counts } = data;
const last = surprise.length - 1, first = counts.indexOf(true);
const place = slider("token", 0, last, first);
const prompt = box("count the prompt", false), eos = box("count EOS", true);
const svg = add(root, "svg", { height: 230, role: "img", "aria-label": host.querySelector("img").alt });
const line = add(root, "p"), sum = add(root, "output");
const counted = (i) => (counts[i] ? i < last || eos.checked : prompt.checked);
const visible = (text) => text.replace(/\n/g, "\u21b5").replace(/ /g, "\u00b7");

drawAlways(() => {
  const width = Math.max(280, host.clientWidth - 16), step = 30;
  const now = Number(place.value), shown = Math.min(surprise.length, Math.floor((width - 40) / step));
  const from = Math.max(0, Math.min(last + 1 - shown, now - Math.floor(shown / 2)));
  const highest = Math.max(...surprise), y = (nats) => 130 - (120 * nats) / highest;
  svg.setAttribute("viewBox", `0 0 ${width} 230`);
  svg.replaceChildren();
  add(svg, "text", { x: 0, y: 18 }, highest.toFixed(0));
  add(svg, "text", { x: 0, y: 134 }, "0");
  for (let i = from; i < from + shown; i++) {
    const x = 34 + (i - from) * step;
    const bar = { x, y: y(surprise[i]), width: step - 6, height: 130 - y(surprise[i]) + 1, fill: counted(i) ? "#2d6a4f" : "#ced4da" };
    if (i === now) Object.assign(bar, { stroke: "#d00000", "stroke-width": 3 });
    add(svg, "rect", bar);
    add(svg, "text", { x: 0, y: 0, transform: `translate(${x + 8} 142) rotate(60)` }, visible(tokens[i + 1]).slice(0, 11));
  }
  const read = visible(tokens.slice(Math.max(0, now - 5), now + 1).join(""));
  const p = Math.exp(-surprise[now]);
  line.textContent = `After \u201c\u2026${read}\u201d the right token is \u201c${visible(tokens[now + 1])}\u201d: p = ${p.toPrecision(2)}, ` +
    `\u2212log p = ${surprise[now].toFixed(2)}. ${counted(now) ? "It counts." : "It does not count."}`;
  const chosen = surprise.filter((_, i) => counted(i));
  const loss = chosen.reduce((a, b) => a + b, 0) / chosen.length;
  sum.textContent = `loss = mean of ${chosen.length} tokens = ${loss.toFixed(3)} nats`;
  sum.dataset.value = loss;
});

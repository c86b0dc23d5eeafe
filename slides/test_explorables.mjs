// Use every explorable of the given pages in headless Chromium, without a network, as a reader would.
//
//     node slides/test_explorables.mjs build/course/day1_alpaca.html build/slides/day1_alpaca.html
//
// Each must have drawn itself over its picture, compute what Python computed for each choice of its inputs, keep its keys to itself,
// and fit a phone. Prints one line a fault; ends with 1 if any, or if a page has none.
import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

// Runs inside a frame. Returns how many explorables it has, and their faults.
function use() {
  const faults = [], hosts = [...document.querySelectorAll("div")].filter((element) => element.shadowRoot);
  const move = (slider, value) => {
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  };
  for (const host of hosts) {
    const root = host.shadowRoot;
    const inputs = Object.fromEntries([...root.querySelectorAll("label")].map((label) => [label.textContent, label.querySelector("input")]));
    const place = root.querySelector("input[type=range]"), shown = root.querySelector("output");
    for (const { inputs: chosen, value } of JSON.parse(host.dataset.python)) {
      for (const [name, choice] of Object.entries(chosen)) {
        if (typeof choice === "number") move(inputs[name], choice);
        else if (inputs[name].checked !== choice) inputs[name].click();
      }
      const found = Number(shown.dataset.value);
      if (!(Math.abs(found - value) < 1e-9)) faults.push(`${JSON.stringify(chosen)}: ${found} in the browser, ${value} in Python`);
    }
    const before = root.querySelector("p").textContent;
    move(place, Number(place.value) > place.min ? place.min : place.max);
    if (root.querySelector("p").textContent === before) faults.push("the slider moves nothing");
    let heard = 0;
    document.addEventListener("keydown", () => heard++, { once: true });
    place.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, composed: true }));
    if (heard) faults.push("a key pressed in the slider reaches the page");
    if (!root.querySelectorAll("svg rect").length) faults.push("nothing is drawn");
    if (root.querySelector("svg").getBoundingClientRect().right > innerWidth + 1) faults.push("it is wider than the window");
  }
  return { count: hosts.length, faults };
}

const pages = process.argv.slice(2);
if (!pages.length || pages.some((page) => !existsSync(page))) {
  console.error(`no page at ${pages.join(", ") || "(none given)"}: run \`make run\` and \`make slides\``);
  process.exit(1);
}
const browser = await puppeteer.launch({
  executablePath: process.env.CHROME_PATH || "/usr/bin/chromium",
  args: ["--host-resolver-rules=MAP * ~NOTFOUND", ...(process.getuid?.() === 0 ? ["--no-sandbox"] : [])],
});
let failed = false;
try {
  for (const name of pages) {
    for (const width of [1280, 390]) {
      const page = await browser.newPage(), requests = [], faults = [];
      await page.setViewport({ width, height: 720 });
      page.on("request", (request) => /^(file|data|blob|about):/.test(request.url()) || requests.push(request.url()));
      page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
      await page.goto(pathToFileURL(resolve(name)).href, { waitUntil: "load" });
      let count = 0;
      for (const frame of page.frames()) {
        const used = await frame.evaluate(use);
        count += used.count;
        faults.push(...used.faults);
      }
      if (!count) faults.push("it has no explorable");
      faults.push(...requests.map((url) => `asked the network: ${url}`));
      faults.forEach((fault) => console.log(`${basename(name)}, ${width} pixels: ${fault}`));
      console.log(`${basename(name)}, ${width} pixels: ${count} explorables, ${faults.length || "no"} faults`);
      failed ||= faults.length > 0;
      await page.close();
    }
  }
} finally {
  await browser.close();
}
process.exit(failed ? 1 : 0);

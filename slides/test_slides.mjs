// Open every slide of the built decks in headless Chromium at 1280 x 720, as an audience would see it.
//
//     node slides/test_slides.mjs build/slides/day1_alpaca.html [--pictures FOLDER]
//
// Checks of every slide: nothing reaches over its edge or into the footer, no text lies on other text, no picture is missing, letters
// can be read from the back, no TeX is left as text, and no request leaves the machine. Prints one line a fault; ends with 1 if any.
// --pictures writes a PNG of every slide, to be looked at.
import { existsSync, mkdirSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const WIDTH = 1280, HEIGHT = 720;
const SMALLEST = { prose: 28, table: 22, code: 24 }; // pixels; inline code is part of its prose

// Runs inside the page. Returns the faults of the slide that is shown.
function faultsOf(section, smallest) {
  const faults = [];
  const frame = section.getBoundingClientRect();
  const footer = section.querySelector(":scope > footer")?.getBoundingClientRect();
  const floor = footer ? footer.top : frame.bottom;
  const name = (element) => `<${element.tagName.toLowerCase()}> ${(element.textContent || element.alt || "").replace(/\s+/g, " ").trim().slice(0, 40)}`;
  if (section.scrollHeight > section.clientHeight + 1 || section.scrollWidth > section.clientWidth + 1) faults.push("it overflows");

  const content = [...section.querySelectorAll("*")].filter((element) => !element.closest("footer, header"));
  for (const element of content) {
    if (element.closest("mjx-container") && element.tagName.toLowerCase() !== "mjx-container") continue;
    const place = element.getBoundingClientRect();
    if (!place.width || !place.height) continue;
    const out = place.left < frame.left - 1 || place.right > frame.right + 1 || place.top < frame.top - 1 || place.bottom > floor + 1;
    if (out) faults.push(`reaches over the edge: ${name(element)}`);
    if (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline" && element.clientWidth)
      faults.push(`wider than its place: ${name(element)}`);
  }
  const blocks = [...section.children].filter((element) => !["FOOTER", "HEADER"].includes(element.tagName));
  blocks.slice(1).forEach((block, index) => {
    if (block.getBoundingClientRect().top < blocks[index].getBoundingClientRect().bottom - 1) faults.push(`lies on what is above: ${name(block)}`);
  });
  for (const picture of section.querySelectorAll("img")) {
    if (!picture.complete || !picture.naturalWidth) faults.push(`broken picture: ${picture.getAttribute("src")}`);
    if (!picture.alt) faults.push(`a picture without a description: ${picture.getAttribute("src")}`);
  }
  const walker = document.createTreeWalker(section, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.textContent.trim(), parent = node.parentElement;
    if (!text || parent.closest("footer, header, mjx-container, style, script")) continue;
    const kind = parent.closest("table") ? "table" : parent.closest("code") ? "code" : "prose";
    const size = parseFloat(getComputedStyle(parent).fontSize);
    if (size < smallest[kind] - 0.01 && !(kind === "table" && parent.closest("code") && size >= 20)) faults.push(`letters of ${size} pixels: ${text.slice(0, 40)}`);
    if (!parent.closest("code") && /\$|\\[([a-zA-Z]/.test(text)) faults.push(`raw TeX: ${text.slice(0, 40)}`);
  }
  if (section.querySelector("mjx-merror, .katex-error, [data-mjx-error]")) faults.push("a formula with an error");
  return faults;
}

async function check(browser, deck, folder) {
  const faults = [], requests = [];
  const page = await browser.newPage();
  await page.setViewport({ width: WIDTH, height: HEIGHT, deviceScaleFactor: 1 });
  page.on("request", (request) => /^(file|data|blob|about):/.test(request.url()) || requests.push(request.url()));
  page.on("requestfailed", (request) => faults.push(`not loaded: ${request.url()}`));
  page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
  const address = pathToFileURL(resolve(deck)).href;
  await page.goto(address, { waitUntil: "load" });
  const count = await page.$$eval("section[data-marpit-pagination-total], svg[data-marpit-svg]", () =>
    document.querySelectorAll("svg[data-marpit-svg]").length);
  if (!count) faults.push("it holds no slide");
  for (let number = 1; number <= count; number++) {
    await page.evaluate((hash) => { location.hash = hash; }, `#${number}`);
    await page.waitForFunction((index) => {
      const slide = document.querySelectorAll("svg[data-marpit-svg]")[index];
      return getComputedStyle(slide).visibility === "visible" && slide.getBoundingClientRect().width > 0;
    }, { timeout: 10000 }, number - 1);
    await page.evaluate(() => document.fonts.ready.then(() => true));
    const found = await page.evaluate(
      (source, index, smallest) => {
        const slide = document.querySelectorAll("svg[data-marpit-svg]")[index];
        const { width, height } = slide.getBoundingClientRect();
        const size = Math.abs(width - innerWidth) > 1 || Math.abs(height - innerHeight) > 1 ? [`it is shown at ${width} x ${height}`] : [];
        return size.concat(new Function(`return (${source})`)()(slide.querySelector("section"), smallest));
      },
      faultsOf.toString(), number - 1, SMALLEST);
    faults.push(...[...new Set(found)].map((fault) => `slide ${number}: ${fault}`));
    if (folder) await page.addStyleTag({ content: ".bespoke-marp-osc { display: none !important }" });
    if (folder) await page.screenshot({ path: join(folder, `${basename(deck, ".html")}_${String(number).padStart(2, "0")}.png`) });
  }
  await page.close();
  return { count, faults: faults.concat(requests.map((url) => `asked the network: ${url}`)) };
}

const words = process.argv.slice(2);
const at = words.indexOf("--pictures");
const [, folder] = at < 0 ? [] : words.splice(at, 2);
if (folder) mkdirSync(folder, { recursive: true });
if (!words.length || words.some((deck) => !existsSync(deck))) {
  console.error(`no deck at ${words.join(", ") || "(none given)"}: run \`make slides\``);
  process.exit(1);
}
const browser = await puppeteer.launch({
  executablePath: process.env.CHROME_PATH || "/usr/bin/chromium",
  // root, as in a container, cannot use Chromium's sandbox; no host name has an address, so nothing can be reached
  args: ["--host-resolver-rules=MAP * ~NOTFOUND", ...(process.getuid?.() === 0 ? ["--no-sandbox"] : [])],
});
let failed = false;
try {
  for (const deck of words) {
    const { count, faults } = await check(browser, deck, folder);
    faults.forEach((fault) => console.log(`${basename(deck)}: ${fault}`));
    console.log(`${basename(deck)}: ${count} slides, ${faults.length || "no"} fault${faults.length === 1 ? "" : "s"}`);
    failed ||= faults.length > 0;
  }
} finally {
  await browser.close();
}
process.exit(failed ? 1 : 0);

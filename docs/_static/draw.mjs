// New images, drawn in the page by a generator that was exported when the site was built. The start page imports this
// module at a click (docs/_extensions/browser_generators.py).

import * as ort from "./onnxruntime/ort.mjs";

const MODELS = new URL("../models/", import.meta.url);
const BINARY = new URL("./onnxruntime/ort-wasm.packed", import.meta.url);

// --- loading ------------------------------------------------------------------------------------------------------

async function fetched(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${response.status} for ${address.pathname}`);
  return response;
}

async function unpacked(address) {
  const { body } = await fetched(address);
  return new Response(body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function loadRuntime() {
  ort.env.wasm.numThreads = 1;  // more would need headers that a static host does not send
  ort.env.wasm.wasmBinary = await unpacked(BINARY);
}

const sessions = new Map();

function session({ file }) {
  if (!sessions.has(file)) {
    const loaded = fetched(new URL(file, MODELS)).then((response) => response.arrayBuffer())
      .then((bytes) => ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] }));
    loaded.catch(() => sessions.delete(file));  // to be tried again
    sessions.set(file, loaded);
  }
  return sessions.get(file);
}

// --- latent vectors -----------------------------------------------------------------------------------------------

function normal(length) {
  return Float32Array.from({ length }, () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
}

// The point on the arc between two vectors, as training.latents.slerp of the examples.
export function between(a, b, share) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const angle = Math.acos(Math.min(Math.max(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)), -1), 1));
  const straight = Math.sin(angle) < 1e-4;
  const from = straight ? 1 - share : Math.sin((1 - share) * angle) / Math.sin(angle);
  const to = straight ? share : Math.sin(share * angle) / Math.sin(angle);
  return a.map((value, i) => from * value + to * b[i]);
}

// The image in [-1, 1] with its channels, height and width, and the last attention map with its numbers of positions.
export async function generate(generator, z, label) {
  const network = await session(generator), [first, second] = network.inputNames;
  const inputs = { [first]: new ort.Tensor("float32", z, [1, z.length]) };
  if (second) inputs[second] = new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]);
  const [image, ...maps] = Object.values(await network.run(inputs));
  const map = maps.at(-1);
  return {
    image: image.data, size: image.dims.slice(1),
    attention: map && { weights: map.data, queries: map.dims[1], keys: map.dims[2] },
  };
}

// --- drawing ------------------------------------------------------------------------------------------------------

function canvasOf(pixels, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

// In color, or dark and gray, as what a map is laid over.
function picture({ image, size: [channels, height, width] }, gray) {
  const count = height * width, pixels = new Uint8ClampedArray(4 * count).fill(255);
  for (let i = 0; i < count; i++) {
    const rgb = [0, 1, 2].map((c) => 127.5 * (image[(channels === 1 ? 0 : c) * count + i] + 1));
    const light = 25.5 + 0.55 * (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]);
    pixels.set(gray ? [light, light, light] : rgb, 4 * i);
  }
  return canvasOf(pixels, width, height);
}

// Full color from half of the row's largest weight on, as in the explorer.
function overlay({ weights, keys }, query, ramp) {
  const row = weights.subarray(query * keys, (query + 1) * keys), side = Math.round(Math.sqrt(keys));
  const full = Math.max(Math.max(...row) / 2, 4 / keys), pixels = new Uint8ClampedArray(4 * keys);
  row.forEach((weight, i) => {
    const level = Math.min(1, weight / full), at = level * (ramp.length - 1);
    const below = Math.min(Math.floor(at), ramp.length - 2);
    const color = ramp[below].map((value, c) => 255 * (value + (at - below) * (ramp[below + 1][c] - value)));
    pixels.set([...color, 255 * 0.9 * level], 4 * i);
  });
  return canvasOf(pixels, side, side);
}

function paint(canvas, layers) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (const layer of layers) context.drawImage(layer, 0, 0, canvas.width, canvas.height);
}

function ring(canvas, [row, column], side) {
  const context = canvas.getContext("2d"), unit = canvas.width / 64;
  for (const [style, width] of [["#000", 1.3], ["#1aff33", 0.7]]) {
    context.beginPath();
    context.arc((column + 0.5) / side * canvas.width, (row + 0.5) / side * canvas.height, 1.7 * unit, 0, 2 * Math.PI);
    Object.assign(context, { strokeStyle: style, lineWidth: width * unit });
    context.stroke();
  }
}

// --- the page -----------------------------------------------------------------------------------------------------

const PARTS = `
  <div class="draw-controls">
    <label>Generator <select name="generator"></select></label>
    <label>Kind <select name="label"></select></label>
    <button type="button" name="both">Two new ones</button>
  </div>
  <div class="draw-view" tabindex="0" role="application" aria-label="Drawn image and attention map" aria-describedby="draw-said">
    <figure><canvas name="image"></canvas><figcaption>Drawn just now</figcaption></figure>
    <figure><canvas name="map"></canvas><figcaption>What the position in the ring attends to</figcaption></figure>
  </div>
  <div class="draw-walk">
    <button type="button" name="end" aria-label="Another start"><canvas></canvas></button>
    <input type="range" min="0" max="1" step="0.01" value="0" aria-label="From one latent vector to the other">
    <button type="button" name="end" aria-label="Another end"><canvas></canvas></button>
  </div>
  <p class="draw-said" id="draw-said" aria-live="polite"></p>`;

export async function start(root) {
  const [listed] = await Promise.all([
    fetched(new URL("generators.json", MODELS)).then((response) => response.json()), loadRuntime(),
  ]);
  await session(listed.generators[0]);
  root.innerHTML = PARTS;
  const part = (name) => root.querySelector(`[name=${name}]`), said = root.querySelector(".draw-said");
  const view = root.querySelector(".draw-view"), slider = root.querySelector("[type=range]");
  const ends = [...root.querySelectorAll("[name=end]")];
  const state = { generator: listed.generators[0], label: 0, latents: [], at: [0.5, 0.36], drawn: null };

  const side = () => Math.round(Math.sqrt(state.drawn.attention.queries));
  const cell = () => state.at.map((share) => Math.floor(share * side()));

  function show() {
    const { drawn } = state, { attention } = drawn, image = part("image"), map = part("map");
    map.parentElement.hidden = !attention;
    for (const canvas of [image, map]) canvas.width = canvas.height = drawn.size[2] * Math.round(512 / drawn.size[2]);
    paint(image, [picture(drawn)]);
    said.textContent = attention ? "" : "This generator has no attention layer.";
    if (!attention) return;
    const [row, column] = cell(), query = row * side() + column;
    paint(map, [picture(drawn, true), overlay(attention, query, listed.ramp)]);
    for (const canvas of [image, map]) ring(canvas, [row, column], side());
    const weights = attention.weights.subarray(query * attention.keys, (query + 1) * attention.keys);
    const peak = weights.indexOf(Math.max(...weights)), columns = Math.round(Math.sqrt(attention.keys));
    said.textContent = `Row ${row}, column ${column} of ${side()}×${side()} attends most to row ${Math.floor(peak / columns)}, ` +
      `column ${peak % columns}, with weight ${Number(weights[peak].toPrecision(2))}.`;
  }

  // The network draws one image at a time, and of those that were wanted meanwhile the last.
  let busy = false, wanted = null;
  async function draw(what) {
    wanted = what;
    if (busy) return;
    busy = true;
    try {
      while (wanted) {
        const [mine] = [wanted, wanted = null];
        await mine();
      }
    } catch (error) {
      said.textContent = `It could not be drawn (${error.message}).`;
    } finally {
      busy = false;
    }
  }

  const walked = () => between(...state.latents, Number(slider.value));
  const middle = async () => {
    const { generator, label } = state, drawn = await generate(generator, walked(), label);
    if (generator === state.generator) { state.drawn = drawn; show(); }
  };
  const all = async () => {
    for (const [i, z] of state.latents.entries()) {
      const drawn = await generate(state.generator, z, state.label), canvas = ends[i].firstChild;
      [canvas.width, canvas.height] = [drawn.size[2], drawn.size[1]];
      paint(canvas, [picture(drawn)]);
    }
    await middle();
  };
  const renew = (...which) => {
    for (const i of which) state.latents[i] = normal(state.generator.zDim);
    return draw(all);
  };

  function choose(generator) {
    Object.assign(state, { generator, label: 0 });
    part("label").replaceChildren(...generator.classes.map((name, i) => new Option(name, i)));
    part("label").parentElement.hidden = generator.classes.length === 0;
    return renew(0, 1);
  }

  part("generator").append(...listed.generators.map(({ title }, i) => new Option(title, i)));
  part("generator").parentElement.hidden = listed.generators.length === 1;
  part("generator").onchange = ({ target }) => choose(listed.generators[target.value]);
  part("label").onchange = ({ target }) => { state.label = Number(target.value); draw(all); };
  part("both").onclick = () => renew(0, 1);
  ends.forEach((button, i) => { button.onclick = () => { slider.value = i; renew(i); }; });
  slider.oninput = () => draw(middle);

  const move = (at) => {
    state.at = at.map((share) => Math.min(Math.max(share, 0), 1 - 1e-9));
    if (state.drawn) show();
  };
  for (const canvas of [part("image"), part("map")]) {
    let before = state.at;
    const follow = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      move([(clientY - box.top) / box.height, (clientX - box.left) / box.width]);
    };
    canvas.onpointerdown = (event) => { before = state.at; follow(event); };
    canvas.onpointermove = follow;
    canvas.onpointercancel = () => move(before);  // it was a swipe, which scrolls the page
  }
  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  view.onkeydown = (event) => {
    if (!(event.key in STEPS) || !state.drawn?.attention) return;
    event.preventDefault();
    move(cell().map((value, i) => (value + STEPS[event.key][i] + 0.5) / side()));
  };
  await choose(state.generator);
}

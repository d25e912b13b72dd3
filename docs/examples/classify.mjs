// Classify a picture with a model of: potstill export RUN --preprocessing resize
//   npm install onnxruntime-web
//   node classify.mjs model.onnx picture.ppm
// The same code runs in a browser, where a canvas gives the pixels; onnxruntime-node is faster and has the same API.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";

const [model, picture] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;

// A PPM image, "P6 WIDTH HEIGHT 255", then RGB bytes. Any decoder will do that gives such bytes.
const bytes = await readFile(picture);
const head = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(bytes.subarray(0, 64).toString("latin1"));
if (!head) {
  console.error(`${picture} is no binary PPM image of 8 bits`);
  process.exit(3);
}
const [width, height] = head.slice(1).map(Number);
const pixels = new Uint8Array(bytes.subarray(head[0].length, head[0].length + 3 * width * height));

const content = await readFile(model);
const session = await ort.InferenceSession.create(new Uint8Array(content), { executionProviders: ["wasm"] });
const { logits } = await session.run({ images: new ort.Tensor("uint8", pixels, [1, height, width, 3]) });

const largest = Math.max(...logits.data);
const powers = Array.from(logits.data, (each) => Math.exp(each - largest));
const sum = powers.reduce((a, b) => a + b);
const names = JSON.parse(await readFile(`${model}.json`, "utf8")).class_names; // written beside the file
names
  .map((name, i) => [name, powers[i] / sum])
  .sort((a, b) => b[1] - a[1])
  .slice(0, 3)
  .forEach(([name, share]) => console.log(name, share.toFixed(4)));

// A session for the graph: what a JSON file says, held against what model.json says of each input.
import { readFile } from 'node:fs/promises';
import { endianness } from 'node:os';
import { dirname, join } from 'node:path';
import { getSystemErrorMap } from 'node:util';
import { Tensor } from 'onnxruntime-node';

const ARRAYS = { float32: Float32Array, float64: Float64Array };

export class BadSession extends Error {}

const reason = (error) => getSystemErrorMap().get(error.errno)?.[1] ?? error.message;

async function parse(file) {
  const text = await readFile(file, 'utf8').catch((error) => {
    throw new BadSession(`${file}: cannot be read: ${reason(error)}`);
  });
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new BadSession(`${file}: not JSON, which has null for "not a number": ${error.message}`);
  }
}

// The numbers of nested lists in one row; null is "not a number".
function flatten(values, [size, ...sizes], place, wrong) {
  if (size === undefined) {
    if (values !== null && typeof values !== 'number') throw wrong(`${place} is ${JSON.stringify(values).slice(0, 40)}, not a number`);
    return [values ?? NaN];
  }
  if (!Array.isArray(values)) throw wrong(`${place} is ${JSON.stringify(values).slice(0, 40)}, not a list`);
  if (values.length !== size) throw wrong(`${place} has ${values.length} entries, not ${size}`);
  return values.flatMap((value, index) => flatten(value, sizes, `${place}[${index}]`, wrong));
}

// The numbers of a raw little-endian file that lies beside the session.
async function readRaw({ file, shape }, folder, Numbers, sizes, name, wrong) {
  if (endianness() !== 'LE') throw wrong(`${name} is in a little-endian file, and this machine is not`);
  if (`${shape}` !== `${sizes}`) throw wrong(`${name}.shape is ${JSON.stringify(shape) ?? 'missing'}`);
  const bytes = await readFile(join(folder, `${file}`)).catch((error) => {
    throw wrong(`${name}.file ${file} cannot be read: ${reason(error)}`);
  });
  const expected = sizes.reduce((product, size) => product * size) * Numbers.BYTES_PER_ELEMENT;
  if (bytes.length !== expected) throw wrong(`${name}.file ${file} has ${bytes.length} bytes, not ${expected}`);
  return new Numbers(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

// The inputs of the graph by name. A session that does not fit ends in one line with the file, the input, what is wrong and what is expected.
export async function readSession(file, { inputs, tensors }) {
  const session = await parse(file);
  const feeds = {};
  for (const name of ['heard', ...inputs.filter((input) => input !== 'heard')]) {
    const { type, shape, meaning } = tensors[name];
    const sizes = [1, ...shape.slice(1)]; // one session
    const wrong = (what) => new BadSession(`${file}: ${what}: shape ${sizes.join(' × ')}, ${meaning}`);
    const values = session?.[name];
    if (values === undefined) throw wrong(`${name} is missing`);
    const data = values?.file === undefined
      ? ARRAYS[type].from(flatten(values, sizes, name, wrong))
      : await readRaw(values, dirname(file), ARRAYS[type], sizes, name, wrong);
    const receiver = (index) => Math.floor((index * sizes[1]) / data.length);
    if (name === 'heard') {
      const bad = data.findIndex((value) => value !== 0 && value !== 1);
      if (bad >= 0) throw wrong(`heard[0][${bad}] is neither 0 nor 1`);
    } else {
      const allowed = (value) => Number.isFinite(value) || (name === 'clock_error' && Number.isNaN(value));
      const bad = data.findIndex((value, index) => feeds.heard.data[receiver(index)] === 1 && !allowed(value));
      if (bad >= 0) throw wrong(`${name}[0][${receiver(bad)}] is not finite where heard is 1`);
    }
    feeds[name] = new Tensor(type, data, sizes);
  }
  return feeds;
}

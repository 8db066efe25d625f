// Locate a transmitter with a bundle of Heimdall Train: no Python, no torch.
//
//     npm ci --ignore-scripts            (the CPU runtime is in the package; its install script would fetch others)
//     node locate.mjs BUNDLE             the sample that came with the bundle
//     node locate.mjs BUNDLE SESSION     a session of your own, a JSON file in the form of sample.json
//
// Prints the fix as JSON. A bundle that is not whole, or a runtime that computes it wrongly, ends in one line and exit code 2.
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { endianness } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { env, InferenceSession, Tensor } from 'onnxruntime-node';

env.logLevel = 'error';

class BadBundle extends Error {}

// Every file is the one that its digest in SHA256SUMS says.
async function checkSums(bundle) {
  const lines = (await readFile(join(bundle, 'SHA256SUMS'), 'utf8')).split('\n').filter(Boolean);
  for (const line of lines) {
    const [digest, name] = line.split('  ');
    if (basename(name) !== name) throw new BadBundle(`SHA256SUMS names ${name}, which is not a file of the bundle`);
    const found = createHash('sha256').update(await readFile(join(bundle, name))).digest('hex');
    if (found !== digest) throw new BadBundle(`${name} was altered since the export`);
  }
  if (!['model.onnx', 'model.json', 'sample.json'].every((name) => lines.some((line) => line.endsWith(`  ${name}`)))) {
    throw new BadBundle('SHA256SUMS is not whole');
  }
}

// One input of the graph: numbers in nested lists, null for "not a number", or a file of raw little-endian float32.
async function tensor(values, { type }, folder) {
  if (values.file) {
    if (endianness() !== 'LE') throw new BadBundle('samples are little-endian, this machine is not');
    const bytes = await readFile(join(folder, values.file));
    return new Tensor(type, new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), values.shape);
  }
  const numbers = values.flat().map((value) => value ?? NaN);
  return new Tensor(type, type === 'float64' ? Float64Array.from(numbers) : Float32Array.from(numbers), [values.length, values[0].length]);
}

async function locate(bundle, sessionFile) {
  await checkSums(bundle);
  const description = JSON.parse(await readFile(join(bundle, 'model.json'), 'utf8'));
  if (description.format !== 1) throw new BadBundle(`model.json has format ${description.format}, this program reads 1`);
  const session = JSON.parse(await readFile(sessionFile, 'utf8'));
  const feeds = {};
  for (const name of description.inputs) feeds[name] = await tensor(session[name], description.tensors[name], dirname(sessionFile));
  const graph = await InferenceSession.create(join(bundle, 'model.onnx'));
  const { position, position_enu, sigma, covariance } = await graph.run(feeds, ['position', 'position_enu', 'sigma', 'covariance']);
  const [east, north] = position_enu.data;
  if (session.position_enu) {
    const off = Math.hypot(east - session.position_enu[0][0], north - session.position_enu[0][1]);
    if (!(off <= 0.1)) throw new BadBundle(`this runtime answers the sample ${off.toFixed(2)} m off`);
  }
  return {
    latitude: position.data[0],
    longitude: position.data[1],
    east_m: east,
    north_m: north,
    sigma_east_m: sigma.data[0],
    sigma_north_m: sigma.data[1],
    covariance_east_north_m2: covariance.data[1],
  };
}

const [bundle, sessionFile] = process.argv.slice(2);
if (!bundle) {
  console.error('usage: node locate.mjs BUNDLE [SESSION.json]');
  process.exit(2);
}
try {
  console.log(JSON.stringify(await locate(bundle, sessionFile ?? join(bundle, 'sample.json'))));
} catch (error) {
  console.error(`locate: ${bundle}: ${error.message.split('\n')[0]}`);
  process.exit(2);
}

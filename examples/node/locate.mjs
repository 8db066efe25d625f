// Locate a transmitter with a bundle of Heimdall Train: no Python, no torch.
//
//     npm ci --ignore-scripts            (the CPU runtime is in the package; its install script would fetch others)
//     node locate.mjs BUNDLE             the sample that came with the bundle
//     node locate.mjs BUNDLE SESSION     a session of your own, a JSON file in the form of sample.json
//
// Prints the fix as JSON. A bundle that is not whole, a session that does not fit it (session.mjs), or a runtime that computes it wrongly, ends in one
// line and exit code 2.
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { env, InferenceSession } from 'onnxruntime-node';
import { BadSession, readSession } from './session.mjs';

env.logLevel = 'error';

class BadBundle extends Error {}

// Every file is the one that its digest in SHA256SUMS says.
async function checkSums(bundle) {
  const sums = await readFile(join(bundle, 'SHA256SUMS'), 'utf8').catch(() => {
    throw new BadBundle('no SHA256SUMS: not a bundle, or an unfinished one');
  });
  const lines = sums.split('\n').filter(Boolean);
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

// This runtime answers the sample as the export did.
async function checkSample(bundle, description, graph) {
  const file = join(bundle, 'sample.json');
  const expected = JSON.parse(await readFile(file, 'utf8'));
  const { position_enu } = await graph.run(await readSession(file, description), ['position_enu']);
  const off = Math.hypot(position_enu.data[0] - expected.position_enu[0][0], position_enu.data[1] - expected.position_enu[0][1]);
  if (!(off <= Math.max(0.1, 1e-3 * Math.max(...expected.sigma[0])))) throw new BadBundle(`this runtime answers the sample ${off.toFixed(2)} m off`);
}

// What a reader should know about the fix; empty where all is well.
function note({ heard, clock_error: clock }, receivers) {
  const counted = receivers.map(({ known }, index) => known && heard.data[index] === 1);
  const few = counted.filter(Boolean).length;
  if (few < 3) return `heard by ${few} receivers that the model knows; three are needed for a position worth the name`;
  const clocks = counted.filter((counts, index) => counts && !Number.isNaN(clock?.data[index])).length;
  if (clocks < 3) return `${clocks} receivers with a disciplined clock; three are needed for time differences: located by levels`;
  return '';
}

async function locate(bundle, sessionFile) {
  await checkSums(bundle);
  const description = JSON.parse(await readFile(join(bundle, 'model.json'), 'utf8'));
  if (description.format !== 1) throw new BadBundle(`model.json has format ${description.format}, this program reads 1`);
  const session = await readSession(sessionFile, description);
  const graph = await InferenceSession.create(join(bundle, 'model.onnx'));
  await checkSample(bundle, description, graph);
  const { position, position_enu, sigma, covariance } = await graph.run(session, ['position', 'position_enu', 'sigma', 'covariance']);
  if (![...position.data, ...covariance.data].every(Number.isFinite)) throw new BadSession(`${sessionFile}: no finite answer: are the units those of model.json?`);
  return {
    latitude: position.data[0],
    longitude: position.data[1],
    east_m: position_enu.data[0],
    north_m: position_enu.data[1],
    sigma_east_m: sigma.data[0],
    sigma_north_m: sigma.data[1],
    covariance_east_north_m2: covariance.data[1],
    note: note(session, description.receivers),
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
  const message = error instanceof BadSession ? error.message : `${bundle}: ${error.message}`;
  console.error(`locate: ${message.replace(/\s+/g, ' ')}`);
  process.exit(2);
}

"""The example for Node.js: what it installs. That it locates is tested with the bundles of test_cli.py and test_iq_chain.py."""
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'node'


def test_the_lock_fixes_every_package_and_names_no_mirror():
    lock = json.loads((EXAMPLE / 'package-lock.json').read_text())
    package = json.loads((EXAMPLE / 'package.json').read_text())
    assert lock['packages']['']['dependencies'] == package['dependencies']
    installed = {name: entry for name, entry in lock['packages'].items() if name}
    assert 'node_modules/onnxruntime-node' in installed
    for name, entry in installed.items():
        assert entry['integrity'].startswith('sha512-'), name
        assert entry.get('resolved', 'https://registry.npmjs.org/').startswith('https://registry.npmjs.org/'), name


def test_what_is_no_bundle_ends_in_one_line(by_node: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    for arguments, words in (([], 'usage: node locate.mjs BUNDLE'), ([tmp_path], 'no such file')):
        done = by_node(*arguments)
        assert done.returncode == 2 and done.stdout == ''
        assert done.stderr.count('\n') == 1 and words in done.stderr

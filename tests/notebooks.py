"""Run a notebook's examples and tests against the shipped package.

`nbdev-test` runs notebooks as they are written, exported cells included, and never imports the package. Here the exported cells
are left out and the names they define come from the package, so that a fault in the export shows and coverage counts.
"""
import importlib
import os
import symtable
import sys
from contextlib import chdir
from pathlib import Path
from traceback import format_exception
from types import ModuleType

import matplotlib.pyplot as plt
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import nb_test_cells

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = {'export', 'exports', 'exporti'}


class CellError(Exception):
    "A cell failed; the message has the notebook, the cell's source and the traceback."


def exported_module(cells: list) -> ModuleType | None:
    "The package's module that these cells' notebook is the source of, or None."
    names = [cell.directives['default_exp'] for cell in cells if 'default_exp' in cell.directives]
    return importlib.import_module(f'heimdall_train.{names[0]}') if names else None


def bound_names(source: str) -> set[str]:
    "The names that a cell defines, imports or assigns at its top level."
    return {symbol.get_name() for symbol in symtable.symtable(source, 'cell', 'exec').get_symbols()
            if symbol.is_assigned() or symbol.is_imported()}


def run_cell(shell: CaptureShell, cell, name: str) -> None:
    "Run one cell; raise `CellError` if it fails."
    shell.run(cell.source)
    if shell.exc is not None:
        trace = ''.join(format_exception(shell.exc))
        raise CellError(f'{name}, cell {cell.idx_}, against the exported package:\n\n{cell.source}\n\n{trace}')


def run_notebook(path: Path) -> int:
    "Run every cell that `nbdev-test` would, but the exported ones, with the package's names; the number of cells run."
    path = path.resolve()
    cells = nb_test_cells(path, skip_flags=get_config(ROOT).tst_flags.split())
    module = exported_module(cells)
    search_path, in_test = list(sys.path), os.environ.get('IN_TEST')
    os.environ['IN_TEST'] = '1'  # nbdev's own commands do nothing while a notebook is tested
    count = 0
    shell = CaptureShell(path)
    try:
        with chdir(path.parent):
            for cell in cells:
                if EXPORTED & cell.directives.keys():
                    shell.push({name: getattr(module, name) for name in bound_names(cell.source) if hasattr(module, name)})
                elif 'default_exp' not in cell.directives:
                    run_cell(shell, cell, path.name)
                    count += 1
    finally:
        plt.close('all')
        shell.close()
        shell.restore_sys_module_state()
        sys.path[:] = search_path
        if in_test is None:
            os.environ.pop('IN_TEST')
        else:
            os.environ['IN_TEST'] = in_test
    return count

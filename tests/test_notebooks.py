"""The numbered notebooks once more, but for the longer ones, with the shipped package in place of its exported cells."""
import json
from pathlib import Path

import pytest
from notebooks import CellError, run_notebook

ROOT = Path(__file__).resolve().parent.parent
# the longer ones, and one whose processes want a port: by nbdev-test only; other tests here call what they export
ONCE = {'12_object_store', '18_formats', '19_modulation', '24_scene', '25_simulation', '26_recordings', '36_iq_features', '40_dataset', '45_anchor',
        '46_tdoa', '47_expected_levels', '48_disagreement', '50_model', '52_timed_model', '54_model_files', '60_metrics', '61_bounds', '62_scores',
        '64_baselines', '65_tdoa_baselines', '66_distributed', '68_checkpoints', '70_training', '72_fusion', '75_tracking', '76_registry',
        '78_report_figures', '79_report_page', '80_export', '81_verification', '82_quantisation', '83_bundle', '90_pipeline', '92_jobs',
        '96_explain'}
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').glob('[0-9]*.ipynb') if path.stem not in ONCE)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_against_package(path: Path):
    try:
        run_notebook(path)
    except CellError as error:
        pytest.fail(str(error), pytrace=False)


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of these code cells, in nbdev's project but not in its folder of notebooks."
    code = [{'cell_type': 'code', 'id': f'cell{number}', 'metadata': {}, 'outputs': [], 'execution_count': None, 'source': source}
            for number, source in enumerate(cells)]
    path.write_text(json.dumps({'cells': code, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}), encoding='utf-8')
    return path


def test_the_package_is_run_not_the_exported_cells(tmp_path: Path):
    path = write_notebook(tmp_path / '00_geodesy.ipynb', '#| default_exp geodesy', "#| export\ndef ranges(): return 'the notebook'",
                          "assert ranges.__module__ == 'heimdall_train.geodesy'")
    assert run_notebook(path) == 1


def test_a_failing_cell_is_shown(tmp_path: Path):
    path = write_notebook(tmp_path / '01_broken.ipynb', 'number = 2', 'assert number == 3', "raise RuntimeError('not reached')")
    with pytest.raises(CellError, match=r'(?s)01_broken.ipynb, cell 1.*assert number == 3.*AssertionError') as caught:
        run_notebook(path)
    assert 'not reached' not in str(caught.value)


def test_flagged_cells_are_left_out(tmp_path: Path):
    flagged = [f'#| {flag}\nassert False' for flag in ('slow', 'notest', 'eval: false')]
    path = write_notebook(tmp_path / '02_slow.ipynb', *flagged, 'assert True')
    assert run_notebook(path) == 1

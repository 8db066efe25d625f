"""Several heads on one backbone, from training through the graph."""
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from resume_job import small_backbone
from torch import nn

from heimdall_train import model as model_module
from heimdall_train import scene as scene_module
from heimdall_train.anchor import Kriging, fit_level_anchor, position_grid
from heimdall_train.export import agree, export_onnx, level_inputs, onnx_session, parity, to_onnx
from heimdall_train.features import level_data, level_statistics
from heimdall_train.model import Correction, LocalizationNet, corrections, match_moments
from heimdall_train.model_files import load_model
from heimdall_train.network import HeimdallError
from heimdall_train.pipeline import make_config, train
from heimdall_train.scene import load_scene, scene_world
from heimdall_train.simulation import simulate_levels


def with_opinions(module: nn.Module) -> nn.Module:
    "Heads that have something to say, each something else; half-precision weights, as training leaves them."
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if '_head.weight' in name:
                parameter.normal_(std=0.3, generator=generator)
            parameter.copy_(parameter.half().float())
    return module.eval()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_module, 'backbone', small_backbone)


@pytest.fixture(scope='module')
def bed() -> tuple:
    scene = replace(load_scene('testbed-v1'), sources={'train': 120, 'validation': 1, 'test': 1})
    network = scene_world(scene).network
    data = level_data(simulate_levels(scene, 'train'), network)
    positions = data.enu(network.frame())
    anchor = fit_level_anchor(positions, data.levels, network.positions_enu(network.frame())[:, :2], position_grid(positions, 150), Kriging())
    return network, anchor, data


def model_of(bed: tuple, heads: int) -> LocalizationNet:
    "An untrained model, with a small backbone: its graph is exported in seconds."
    network, anchor, data = bed
    torch.manual_seed(0)
    return LocalizationNet(network, network.frame(), anchor, level_statistics(data.levels), heads=heads)


def test_one_head_is_what_it_was(bed: tuple):
    "Names of the tensors and draws of the first weights: models and trainings of before go on as they were; only further heads draw further."
    one, several = model_of(bed, 1), model_of(bed, 3)
    assert isinstance(one.correction, Correction)
    for name, tensor in one.state_dict().items():
        assert torch.equal(several.state_dict()[name.replace('correction.', 'correction.0.')], tensor), name


def test_the_graph_of_levels_answers_for_all_heads(bed: tuple):
    model = with_opinions(model_of(bed, 3))
    inputs = level_inputs(bed[2].levels[:16])
    session = onnx_session(export_onnx(model, {}))
    found = parity(model, session, inputs)
    assert agree(found), found
    levels, heard = (torch.from_numpy(value) for value in inputs.values())
    with torch.no_grad():
        matched = model(levels, heard)
        model.correction.train()
        each = model.correct((levels, heard), model.locate(model.anchor, (levels, heard)))
    model.eval()
    assert each[0].shape == (16, 3, 2)
    assert float((each[0] - matched[0][:, None]).norm(dim=2).mean()) > 10, 'the heads say the same'
    covariance = session.run(['covariance'], inputs)[0]
    assert (np.linalg.eigvalsh(covariance) > 0).all()


def test_the_graph_of_the_heads_at_every_scale():
    "From 1 m to 100 km. What a model with a common clock ends in, too: it is the same module."
    heads, names = with_opinions(corrections(3, 6, 16, 0.1)), ('features', 'place', 'factor')
    generator = torch.Generator().manual_seed(1)
    unit = torch.randn(5, 6, generator=generator), torch.randn(5, 2, generator=generator), torch.randn(5, 2, 2, generator=generator).tril()
    session = onnx_session(to_onnx(heads, tuple(value[:2] for value in unit), names, ('position', 'covariance')).SerializeToString())
    exactly = deepcopy(heads).double()
    for metres in (1.0, 1e3, 1e5):
        inputs = unit[0], metres * unit[1], metres * unit[2]
        with torch.no_grad():
            single, double = heads(*inputs), exactly(*(value.double() for value in inputs))
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        for power, (by_graph, by_torch, exact) in enumerate(zip(found, single, double, strict=True), start=1):
            for answer in (by_graph, by_torch.numpy()):
                np.testing.assert_allclose(answer / metres**power, exact.numpy() / metres**power, atol=1e-4, rtol=1e-5)
        assert (np.linalg.eigvalsh(found[1].astype(float)) > 0).all()


def test_gradients_through_the_mixture_reach_every_head():
    heads = with_opinions(corrections(3, 4, 8, 0.0)).double()
    features, position = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    factor = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    assert torch.autograd.gradcheck(lambda *values: heads(*values, factor), (features.requires_grad_(), position.requires_grad_()))
    sum(value.sum() for value in match_moments(*heads.train()(features, position, factor))).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in heads.parameters())


def test_heads_are_a_setting_of_a_run(tmp_path: Path):
    "From `Config` to the file of the model; a training goes on with as many as it began with."
    description = yaml.safe_load((Path(scene_module.__file__).parent / 'scenes' / 'testbed-v1.yaml').read_text())
    sources = {'train': 60, 'validation': 40, 'test': 10}
    (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump({**description, 'name': 'tiny', 'receivers': 8, 'sources': sources}))
    config = make_config(scene=str(tmp_path / 'tiny.yaml'), out=tmp_path / 'run', heads=2, epochs=1, batch_size=16)
    train(config)
    model = load_model(tmp_path / 'run' / 'model.safetensors')
    assert model.heads == len(model.correction) == 2
    with pytest.raises(HeimdallError, match='heads was 2'):
        train(config.model_copy(update={'resume': True, 'heads': 1}))

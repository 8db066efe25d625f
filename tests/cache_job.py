"""One of several writers of a cache, in a process that has little to import."""
from pathlib import Path

from heimdall_train.dataset import cached_features
from heimdall_train.recordings import simulate_sessions
from heimdall_train.scene import load_scene, scene_world


def write_cache(scene_file: Path, folder: Path) -> None:
    "Compute a cache of twelve sessions."
    scene = load_scene(scene_file)
    cached_features(folder, 'key', scene_world(scene).network, lambda rows: simulate_sessions(scene, 'train', numbers=rows), 12)

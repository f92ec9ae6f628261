"""Angles that are looked up are those that are computed."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.model import rope
from engine.model.config import ModelConfig
from engine.model.rope import RotaryEmbedding
from tests.tiny_models import build


def test_positions_inside_and_behind_the_table_have_the_same_angles(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    config = ModelConfig.load(tmp_path)
    embed = RotaryEmbedding(config.rope, config.head_dim, torch.device("cpu"))
    size = min(rope.TABLE_POSITIONS, config.rope.max_context)
    ends = torch.tensor([0, 1, size - 1])
    inside = embed(ends, torch.float32)
    mixed = embed(torch.cat((ends, torch.tensor([size]))), torch.float32)  # one is not in it: all are computed
    for looked_up, computed in zip(inside, mixed, strict=True):
        assert looked_up.shape == (3, 1, config.head_dim)
        assert torch.equal(looked_up, computed[:3])
    torch.testing.assert_close(inside[0][1, 0, 0], torch.tensor(1.0).cos())

"""The table of kernels and tiles on Hopper: what it holds, and that it decides."""

import json

import pytest
from hopper_layer import layer

from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.kernels import target
from gpt_oss_jax.kernels.expert_matmul import mosaic_gpu, tuning


def sizes(config):
    shape = config.num_experts, config.hidden_size, config.intermediate_size
    return shape, config.experts_per_token


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes a table that is read in the place of the package's."""

    def write(entries):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(tuning, "TABLE", path)
        tuning._table.cache_clear()

    yield write
    tuning._table.cache_clear()


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B], ids=["20b", "120b"])
def test_released_shapes_are_measured(config):
    """For the 132 multiprocessors of an H100 or H200, at every size that `generate` makes."""
    measured = tuning._table()[tuning.device_key(132)][tuning.shape_key(*sizes(config))]
    assert sorted(measured) == [2**n for n in range(14)]
    for rows, tile in measured.items():
        assert tile in ((None, 8, 16, 32, 64, 128) if rows <= 128 else (8, 16, 32, 64, 128))


@pytest.mark.parametrize("rows", [1, 3, 40, 64, 65, 500, 8192, 100_000])
def test_a_number_of_rows_has_its_entry_or_the_next(table, rows):
    (E, D, F), X = sizes(GPT_OSS_20B)
    entry = {"1": None, "4": None, "64": 8, "512": 32, "8192": 64}
    table({tuning.device_key(132): {tuning.shape_key((E, D, F), X): entry}})
    wanted = {1: None, 3: None, 40: 8, 64: 8, 65: 32, 500: 32, 8192: 64, 100_000: 64}
    assert tuning.expert_tile(rows, (E, D, F), X, 132) == wanted[rows]


@pytest.mark.parametrize(
    ("rows", "tile"), [(1, None), (80, None), (81, 16), (129, 32), (512, 128), (10_000, 128)]
)
def test_what_nobody_measured_goes_by_a_rule(rows, tile):
    shape, choices = sizes(GPT_OSS_20B)
    assert tuning.expert_tile(rows, shape, choices, 114) == tile


@pytest.mark.parametrize("tile", [None, 16])
def test_the_table_decides(monkeypatch, table, tile):
    x, chosen, weight, w = layer(5, E=3, D=192, F=192)
    taken = []
    for name in ("few_rows", "many_rows"):
        kernel = lambda *_, name=name, **how: taken.append((name, how.get("tile")))
        monkeypatch.setattr(mosaic_gpu, name, kernel)
    shape = tuning.shape_key((3, 192, 192), chosen.shape[1])
    table({tuning.device_key(target.multiprocessors()): {shape: {"8": tile}}})
    mosaic_gpu.on_hopper.__wrapped__(x, chosen, weight, w, limit=7.0)
    assert taken == [("few_rows" if tile is None else "many_rows", tile)]


def test_few_rows_are_no_more_than_can_be_sorted():
    assert tuning.default_tile(64, 256, 16) is None
    assert tuning.default_tile(128, 256, 16) is not None

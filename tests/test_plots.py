"""The pictures: which weights they show, and where."""

import torch
from conftest import assert_png, printed

from evaluate_generalization import networks_to_show
from target_cnn import Score, random_init
from universal import roads
from universal.experiment.pictures import PIXELS, filter_mosaic, plot_evaluation
from universal.experiment.verdict import permute_neurons, random_orders

NETWORKS = [
    {"method": f"generated, step {step}", "accuracy_percent": 90.0, "error_overlap": 0.5, "nearest": "run/epoch_2.pth"}
    for step in (1, 3)
]


def permuted(weights: torch.Tensor) -> torch.Tensor:
    return permute_neurons(weights, random_orders(torch.Generator().manual_seed(0)))


def test_copies_stand_at_the_same_places_whatever_the_order_of_their_neurons():
    init, other, first, end = (random_init(seed) for seed in range(4))
    states = torch.stack([torch.stack(pair) for pair in ((init, other), (first, other), (other, other))])
    states = torch.cat([states, torch.stack([end, permuted(end)])[None]])
    recorded = {"run/epoch_1.pth": first, "run/epoch_2.pth": permuted(end)}
    shown = networks_to_show(states, recorded, NETWORKS)
    assert [title.splitlines()[0] for title in shown] == [
        "unseen init",
        "generated, step 1",
        "generated, step 3",
        "nearest recorded checkpoint",
        "generated, step 3, from a second unseen init",
    ]
    assert "epoch_2.pth" in list(shown)[3]
    for weights, expected in zip(shown.values(), (init, first, end, end, end), strict=True):
        assert torch.equal(weights, expected)


def test_a_filter_lies_in_its_row_and_column_apart_from_others():
    mosaic = filter_mosaic(torch.arange(421_642.0))
    side = 3 * PIXELS + 2
    assert mosaic.shape == (4 * side, 8 * side)
    for index in (0, 7, 8, 31):
        row, column = side * (index // 8), side * (index % 8)
        tile = mosaic[row : row + side, column : column + side]
        weights = tile[1:-1, 1:-1][PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS]
        assert torch.equal(weights, 9.0 * index + torch.arange(9.0).view(3, 3))
        assert tile.isnan().sum() == side**2 - (side - 2) ** 2


def test_one_step_from_one_init_is_drawn_without_a_second(tmp_path):
    states = torch.stack([random_init(0), random_init(1)])[:, None]
    shown = networks_to_show(states, {"run/epoch_2.pth": states[1, 0]}, NETWORKS[:1])
    assert len(shown) == 3
    scores = [Score(10.0, 590.0, 2.3, None), Score(99.0, 8.0, 0.03, None)]
    plot_evaluation(scores, scores, NETWORKS[:1], shown, tmp_path / "plot.png")
    assert_png(tmp_path / "plot.png", 2700, 1080)


def test_the_four_roads_are_drawn_from_what_was_measured(tmp_path, monkeypatch):
    small = {
        "IMAGES": 200, "TEST": 200, "STEPS": (1, 3), "ROUNDED": ("MLP 784-16-10",), "FAMILIES": {"mlp": 1, "rows": 1},
        "KINDS": {"mnist": roads.KINDS["mnist"]}, "HELD_OUT_KINDS": {}, "RATES": (0.001,),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(roads, name, value)
    options = ["--networks", 1, "--ternary", roads.SYNTHESIZER, "--plot", tmp_path / "roads.png"]
    text = printed(roads.main, *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[1][:1].isdigit()}
    assert found["mlp"][0] < 30 < found["mlp"][1] and found["rows"][0] < 30 < found["rows"][1]
    assert found["mlp"][1] != found["rows"][1]  # each of its own family
    assert found["random"][1] < found["written"][1] and found["random"][0] < 30 < found["written"][0]
    assert found["MLP 784-16-10"][0] == found["MLP 784-16-10"][1]  # of the same synthesiser
    assert found["mnist"][1] > 40
    assert_png(tmp_path / "roads.png", height=1350, width=2400)


def test_a_missing_file_of_either_synthesiser_is_made_by_its_own_command(refusal, tmp_path):
    for option, maker in (("--synthesizer", "universal.train"), ("--ternary", "universal.reinforce")):
        message = refusal(roads.main, option, tmp_path / "none.pth", cwd=tmp_path)
        assert message.endswith(f"none.pth: no such file: run python -m {maker} first")

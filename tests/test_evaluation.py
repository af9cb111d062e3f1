"""Evaluating what is written from data sets: its networks, and Adam by the clock beside them."""

import json

import pytest
import torch
from conftest import assert_png, printed, small_synthesizer

from scripting import UserError
from target_cnn import Progress, score, train_with_adam
from universal import evaluate
from universal.data import splits
from universal.evaluation import clock, from_data
from universal.evaluation.networks import EVALUATED, cnn, mlp
from universal.model.synthesizer import save_synthesizer
from universal.reading.graph import ComputationGraph
from universal.rules.synthesis import write


def start(seed):
    torch.manual_seed(seed)
    return mlp([])


def test_every_network_is_written_as_a_whole(train_digits, monkeypatch):
    monkeypatch.setattr("universal.rules.synthesis.balance", lambda *_: {})  # which takes its time
    synthesizer, few = small_synthesizer(0), train_digits[:30]
    for build in EVALUATED.values():
        network = build()
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        assert not write(network, *few, synthesizer=synthesizer).left
        assert not any(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def test_a_wide_and_a_deep_network_are_built_as_named():
    assert len(ComputationGraph(cnn([16, 32, 32, 32, 32], 64)).layers) == 7
    residual = ComputationGraph(EVALUATED["residual network of 6 convolutions"]())
    assert sum(layer.is_convolution for layer in residual.layers) == 6


NETWORKS = "MLP 784-16-10", "conv 4, 8, valid"


@pytest.fixture
def from_digits(tmp_path, monkeypatch, digits):
    """Evaluate networks that are written from few images, in few steps of Adam: the record, and what was printed."""
    monkeypatch.setattr(clock, "FEWEST_STEPS", 5)
    settings = {"FIRST_STEPS": 2, "EPOCHS": 2, "HELD_OUT": 100, "RATES": (0.001, 0.003)}
    for name, value in settings.items():
        monkeypatch.setattr(from_data, name, value)
    monkeypatch.setattr(splits, "training_data", lambda *_: digits[500:])
    monkeypatch.setattr(splits, "scoring_data", lambda *_: digits[:500])

    def run(*options) -> tuple[dict, str]:
        files = ["--plot", tmp_path / "d.png", "--results", tmp_path / "d.json"]
        text = printed(evaluate.main, "--networks", *NETWORKS, "--inits", 2, *files, *options)
        return json.loads((tmp_path / "d.json").read_text()), text

    return run


def test_evaluate_holds_what_is_written_from_data_against_adam_by_the_clock(from_digits, tmp_path):
    record, text = from_digits("--images", 100, "all", 5000)
    rows = {(row["images"], row["network"]): row for row in record["rows"]}
    assert list(rows) == [(count, name) for count in (100, 1400) for name in NETWORKS]
    for (count, name), row in rows.items():
        adam, nulls = row["adam"], row["nulls"]
        assert row["written"]["mean"] > 40 > nulls["init"] and row["left"] == []
        assert nulls["random_features"] > 40 and nulls["pixels"] > 40
        assert adam["equal_seconds"]["seconds"] >= row["seconds"] and 0 < row["error_overlap"] <= 1
        seconds, accuracies = zip(*adam["curve"], strict=True)
        assert list(seconds) == sorted(set(seconds)) and seconds[-1] >= row["seconds"]
        assert adam["matched"] is None or max(accuracies) >= row["on_the_way"]
        assert ("end" in adam) == (count == 100) and ("epoch" in adam) == (count == 1400)
        if count == 1400:
            assert adam["first_steps_from_written"]["accuracy_percent"] > adam["first_steps"]["accuracy_percent"]
        assert f"| {name} " in text and f"| {row['written']['mean']:.2f} (" in text
    assert "mnist, 100 images:" in text and "mnist, 1,400 images:" in text
    assert "mnist: 5,000 images left out: there are fewer" in text
    for line in ("Ahead of Adam at equal seconds: ", "Ahead of Adam when it has stopped gaining, from few images: "):
        assert text.count(line) == 2  # of its number of images, and of all
    assert_png(tmp_path / "d.png", 900, 435)


def test_a_row_tells_how_far_its_networks_make_the_same_errors(from_digits, monkeypatch):
    seen = []
    monkeypatch.setattr(from_data, "mean_pairwise_overlap", lambda wrongs: seen.append(wrongs) or 0.25)
    record, text = from_digits("--images", 100, "--networks", NETWORKS[0])
    (row,), (wrongs,) = record["rows"], seen
    accuracies = [100 * (1 - wrong.double().mean().item()) for wrong in wrongs]
    assert len(accuracies) == 2 and sum(accuracies) / 2 == pytest.approx(row["written"]["mean"])
    assert row["error_overlap"] == 0.25 and "| 0.25 " in text


def test_the_synthesiser_that_is_named_writes_all_networks(from_digits, tmp_path, monkeypatch):
    save_synthesizer(small_synthesizer(7), tmp_path / "other.pth")
    seen = []

    def spy(network, *data, synthesizer, **options):
        seen.append(synthesizer.settings["hidden"])
        return write(network, *data, synthesizer=synthesizer, **options)

    monkeypatch.setattr(from_data, "write", spy)
    from_digits("--images", 100, "--networks", NETWORKS[0], "--synthesizer", tmp_path / "other.pth")
    assert seen == [64] * 4  # two inits, and what is simpler


def test_rows_of_another_file_of_the_same_name_are_not_gone_on_from(from_digits, tmp_path):
    options = ("--images", 100, "--networks", NETWORKS[0], "--synthesizer", tmp_path / "s.pth")
    save_synthesizer(small_synthesizer(7), tmp_path / "s.pth")
    from_digits(*options)
    assert "Going on from 1 rows" in from_digits(*options)[1]
    save_synthesizer(small_synthesizer(8), tmp_path / "s.pth")
    with pytest.raises(UserError, match="is of another evaluation"):
        from_digits(*options)


def made_up(network: str, mean: float, matched: float | None) -> dict:
    """A row as if Adam had been looked at for 8 seconds, to 90 %, and the network written in one."""
    adam = {"curve": [[0, 10], [1, 90.0], [8, 90]], "matched": matched}
    adam["equal_seconds"] = {"accuracy_percent": 90.0, "learning_rate": 0.001}
    nulls = dict.fromkeys(("random_features", "pixels", "init"), 50.0)
    written = {"mean": mean, "minimum": mean, "maximum": mean}
    return {
        "network": network, "images": 1000, "written": written, "seconds": 1.0, "on_the_way": mean, "adam": adam,
        "error_overlap": None, "nulls": nulls,
    }  # fmt: skip


def test_an_evaluation_on_data_goes_on_where_it_was_killed(from_digits, tmp_path, monkeypatch, refusal):
    seen = []

    def evaluated(name, *_):
        if seen == [NETWORKS[0]]:
            raise KeyboardInterrupt
        seen.append(name)
        return made_up(name, 90 + len(seen), None)

    monkeypatch.setattr(evaluate, "evaluate_from_data", evaluated)
    with pytest.raises(KeyboardInterrupt):
        from_digits("--images", "all")
    seen.append("killed")
    record, text = from_digits("--images", "all")
    assert seen == [NETWORKS[0], "killed", NETWORKS[1]]
    assert [row["written"]["mean"] for row in record["rows"]] == [91, 93]
    assert "Going on from 1 rows" in text and f"| {NETWORKS[0]}    | 91.00" in text and "| 93.00" in text
    assert from_digits("--images", "all")[0] == record and len(seen) == 3

    path = tmp_path / "d.json"
    for content in (path.read_text(), "{"):
        path.write_text(content)
        line = refusal(evaluate.main, "--results", path, "--seed", 7)
        assert line == f"{path}: is of another evaluation, or damaged: delete it or choose another --results"
        assert path.read_text() == content


def test_what_adam_does_not_match_counts_at_the_seconds_looked_at():
    printed = from_data.conclusion_of([made_up("one", 90.0, None), made_up("two", 89.9, 2.0)])
    assert "Ahead of Adam at equal seconds: 1 of 2\n" in printed
    assert ": 4.00 in the geometric mean (1 of 2 unmatched and counted at the seconds looked at)" in printed


def test_evaluate_refuses_what_it_cannot_do_before_it_starts(refusal, tmp_path):
    assert "invalid choice: 'GPT'" in refusal(evaluate.main, "--networks", "GPT")
    assert "'3' is not a whole number from 20" in refusal(evaluate.main, "--images", 3)
    missing = tmp_path / "none.pth"
    assert f"{missing}: no such file: run python" in refusal(evaluate.main, "--synthesizer", missing, cwd=tmp_path)
    assert not any(tmp_path.iterdir())


def test_numbers_of_images_that_no_data_set_has_are_refused(from_digits, tmp_path, refusal):
    options = ["--images", 5000, 6000, "--plot", tmp_path / "d.png", "--results", tmp_path / "d.json"]
    line = refusal(evaluate.main, *options)
    assert line == "--images: no data set holds so many: give smaller numbers, or all"
    assert not any(tmp_path.iterdir())


def test_evaluate_refuses_data_sets_that_it_cannot_use(refusal, tmp_path):
    missing, results = tmp_path / "none", tmp_path / "r.json"
    assert str(missing) in refusal(evaluate.main, "--data", missing, "--results", results)
    images, labels = torch.zeros(100, 1, 28, 28), torch.arange(100) % 2
    torch.save({"images": images, "labels": labels}, tmp_path / "same.pt")
    options = ["--networks", NETWORKS[0], "--images", "all", "--results", results]
    line = refusal(evaluate.main, "--data", tmp_path / "same.pt", *options)
    assert line == f"{tmp_path / 'same.pt'}: all images are the same: give images that differ"


def test_images_of_any_size_become_those_that_the_networks_take(tmp_path):
    images = torch.randint(256, (260, 3, 20, 24), dtype=torch.uint8)
    path = tmp_path / "images.pt"
    torch.save({"images": images, "labels": torch.arange(260) % 13}, path)
    data = from_data.load_data_set(str(path), 0, torch.device("cpu"))
    assert [len(part.labels) for part in data] == [144, 15, 41]  # of ten of the 13 classes
    assert {part.images.shape[1:] for part in data} == {(1, 28, 28)}
    assert all(part.labels.max() == 9 for part in data if len(part.labels) > 20)
    assert data.epoch == 2


def small_set(digits) -> from_data.DataSet:
    return from_data.DataSet(digits[:500], digits[500:1000], digits[1000:])


def test_adam_trains_once_at_each_rate_on_the_images_that_are_written_from(monkeypatch, digits):
    monkeypatch.setattr(from_data, "RATES", (1e-9, 1e-3))
    monkeypatch.setattr(from_data, "EPOCHS", 1)
    data, seen = small_set(digits), []

    def spy(network, train, *options, **more):
        seen.append(train)
        return train_with_adam(network, train, *options, **more)

    monkeypatch.setattr(clock, "train_with_adam", spy)
    train = data.known[:400]
    found = from_data.adam_beside(start(0), train, data, seed=0, seconds=0.02, goal=101, whole=True)
    assert len(seen) == 2 and all(each is train for each in seen)
    assert found["epoch"]["learning_rate"] == found["equal_seconds"]["learning_rate"] == 1e-3
    assert found["matched"] is None and found["curve"][-1][1] > 50 > found["curve"][0][1]

    # What is held out says that the init is best, whatever the images that score say.
    doubled = data._replace(held_out=data.held_out._replace(labels=start(0)(data.held_out.images).argmax(1)))
    found = from_data.adam_beside(start(0), train, doubled, seed=0, seconds=0.02, goal=101, whole=True)
    assert found["epoch"]["learning_rate"] == 1e-9
    assert found["epoch"]["accuracy_percent"] == score(start(0), data.test).accuracy_percent


def test_a_curve_says_when_adam_matches_and_when_it_is_over(monkeypatch, digits):
    training = clock.Training(start(0), digits[:500], digits[:100], 1e-3, seed=0, seconds=1.0, most_steps=60)
    training.curve = [(0.0, 10.0), (1.0, 50.0), (2.0, 40.0), (4.0, 80.0), (7.9, 80.05)]
    assert training.matched(30) == 0.5 and training.matched(50) == 1 and training.matched(70) == 3.5
    assert training.matched(90) is None and training.matched(10) == training.matched(5) == 1  # as it is at the start

    monkeypatch.setattr(clock, "FEWEST_STEPS", 50)
    early, late, last = (Progress(1, step, 0.0, 0.0, 8.0) for step in (49, 59, 60))
    assert not training.is_over(late) and training.is_over(last)
    training.curve.append((8.0, 80.09))
    assert training.is_over(late) and not training.is_over(early)
    training.curve.append((8.0, 80.2))
    assert not training.is_over(late)

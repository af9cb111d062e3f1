"""The diffusion model: its shape, its training coordinates in the span of the data, its rollout, its files."""

import pytest
import torch
from torch import nn

from diffusion_model import (
    SimpleWeightSpaceDiffusion,
    SpanDiffusion,
    load_diffusion,
    rollout,
    save_diffusion,
    train_in_span,
)
from scripting import UserError

DIMENSION = 40


@pytest.fixture
def span() -> SpanDiffusion:
    """A model in float64 for three pairs of one run and two of another, some steps into its training."""
    torch.manual_seed(0)
    runs = [torch.randn(epochs, DIMENSION, dtype=torch.float64) for epochs in (4, 3)]
    model = SpanDiffusion.of_runs(runs, time_dim=8, hidden=16)
    train_in_span(model, epochs=5, lr=1e-2, shrinkage=0.5)
    return model


def raw_pairs(span: SpanDiffusion):
    """The training pairs in the units of weights: inputs, steps, targets."""
    inputs = span.inputs * span.input_scale + span.input_mean
    targets = span.targets * span.output_scale + span.output_mean
    return inputs, span.steps, targets


def test_the_sizes_are_the_documents():
    with torch.device("meta"):
        model = SimpleWeightSpaceDiffusion(421_642)
    assert sum(parameter.numel() for parameter in model.parameters()) == 432_528_522
    widths = [(layer.in_features, layer.out_features) for layer in model.main_network if isinstance(layer, nn.Linear)]
    assert widths == [(421_642 + 128, 512), (512, 512), (512, 421_642)]


def test_forward_takes_both_shapes_of_steps_and_refuses_others():
    model = SimpleWeightSpaceDiffusion(DIMENSION, time_dim=8, hidden=16)
    model.last_step.fill_(5)
    weights = torch.randn(3, DIMENSION)
    flat = model(weights, torch.tensor([0, 1, 2]))
    assert flat.shape == (3, DIMENSION)
    assert torch.equal(flat, model(weights, torch.tensor([[0.0], [1.0], [2.0]])))
    assert not torch.equal(flat, model(weights, torch.tensor([0, 1, 3])))
    for weights, steps in (
        (torch.zeros(3, DIMENSION + 1), torch.zeros(3)),
        (torch.zeros(DIMENSION), torch.zeros(1)),
        (torch.zeros(3, DIMENSION), torch.zeros(2)),
        (torch.zeros(3, DIMENSION), torch.zeros(())),
    ):
        with pytest.raises(ValueError, match="expected"):
            model(weights, steps)


def test_steps_after_the_last_recorded_one_are_that_one(span):
    dense = span.expand()
    weights = torch.randn(1, DIMENSION, dtype=torch.float64)
    assert torch.equal(dense(weights, torch.tensor([2])), dense(weights, torch.tensor([40])))
    assert not torch.equal(dense(weights, torch.tensor([2])), dense(weights, torch.tensor([1])))


def test_the_dense_model_is_the_span_model_on_its_training_inputs(span):
    dense = span.expand()
    inputs, steps, _ = raw_pairs(span)
    input_gram, _ = span.gram_matrices()
    coefficients = span.main_network(torch.cat([input_gram, span.time_network(steps[:, None])], dim=1))
    expected = span.output_mean + span.output_scale * coefficients @ span.targets
    torch.testing.assert_close(dense(inputs, steps), expected, rtol=1e-10, atol=1e-10)


def test_the_dense_model_is_the_span_model_on_any_input(span):
    dense = span.expand()
    weights, steps = 3 * torch.randn(7, DIMENSION, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    similarities = (weights - span.input_mean) / span.input_scale @ span.inputs.T / DIMENSION
    time = span.time_network(steps[:, None].double())
    expected = span.main_network(torch.cat([similarities, time], dim=1)) @ span.targets
    expected = span.output_mean + span.output_scale * expected
    torch.testing.assert_close(dense(weights, steps), expected, rtol=1e-10, atol=1e-10)


def test_the_losses_are_the_dense_mean_squares(span):
    dense = span.expand()
    inputs, steps, targets = raw_pairs(span)
    outputs = (dense(inputs, steps) - span.output_mean) / span.output_scale
    error, power = span.losses(*span.gram_matrices())
    assert error.item() == pytest.approx((outputs - span.targets).square().mean().item(), rel=1e-10)
    assert error.item() == pytest.approx(
        ((dense(inputs, steps) - targets) / span.output_scale).square().mean().item(), rel=1e-10
    )
    assert power.item() == pytest.approx(outputs.square().mean().item(), rel=1e-10)


def outside(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of `rows` outside the span of the rows of `basis`."""
    return rows - rows @ torch.linalg.pinv(basis) @ basis


def test_dense_gradient_descent_never_leaves_the_spans(span):
    dense = span.expand()
    before = dense.main_network[0].weight.detach().clone(), dense.main_network[-1].weight.detach().clone()
    inputs, steps, targets = raw_pairs(span)
    descent = torch.optim.SGD(dense.parameters(), lr=0.05)
    for _ in range(20):
        descent.zero_grad()
        (dense(inputs, steps) - targets).square().mean().backward()
        descent.step()
    first, last = dense.main_network[0].weight.detach(), dense.main_network[-1].weight.detach()
    assert (first - before[0])[:, :DIMENSION].abs().max() > 1e-4  # it did move
    assert (last - before[1]).abs().max() > 1e-4
    assert outside(first[:, :DIMENSION], span.inputs).abs().max() < 1e-12
    assert outside(last.T, span.targets).abs().max() < 1e-12
    assert outside(dense.main_network[-1].bias.detach()[None], span.targets).abs().max() < 1e-12


def test_training_lowers_the_loss_towards_its_bound():
    torch.manual_seed(0)
    model = SpanDiffusion.of_runs([torch.randn(5, 300)])
    first, _ = model.losses(*model.gram_matrices())
    assert first.item() == pytest.approx(1, abs=1e-4)  # the mean target, in standardised units
    train_in_span(model, epochs=300, lr=1e-3, shrinkage=0)
    last, _ = model.losses(*model.gram_matrices())
    assert last < 0.01


def test_one_pair_and_constant_runs_can_be_learnt():
    for runs in ([torch.randn(2, DIMENSION)], [torch.ones(3, DIMENSION)]):
        model = SpanDiffusion.of_runs(runs)
        train_in_span(model, epochs=3, lr=1e-3, shrinkage=2)
        next_weights = model.expand()(runs[0][:1], torch.zeros(1))
        torch.testing.assert_close(next_weights, runs[0][1:2])


def test_runs_without_pairs_are_refused():
    for runs in ([], [torch.zeros(1, DIMENSION)], [torch.zeros(2, DIMENSION), torch.zeros(2, DIMENSION + 1)]):
        with pytest.raises(ValueError, match="expected runs"):
            SpanDiffusion.of_runs(runs)


def test_a_rollout_holds_every_state(span):
    dense = span.float().expand()
    start = torch.randn(DIMENSION)
    states = rollout(dense, start, 4)
    assert states.shape == (5, DIMENSION)
    assert torch.equal(states[0], start)
    for step in range(4):
        torch.testing.assert_close(states[step + 1], dense(states[step][None], torch.tensor([step]))[0])


@pytest.mark.parametrize("dense_on_disk", [False, True])
def test_a_saved_model_computes_the_same(span, tmp_path, dense_on_disk):
    span = span.float()
    dense = span.expand()
    path = tmp_path / "model.pth"
    save_diffusion(dense if dense_on_disk else span, path)
    loaded = load_diffusion(path, DIMENSION)
    assert isinstance(loaded, SimpleWeightSpaceDiffusion)
    weights, steps = torch.randn(3, DIMENSION), torch.tensor([0, 1, 2])
    assert torch.equal(loaded(weights, steps), dense(weights, steps))


def test_files_that_are_no_diffusion_model_of_this_dimension_are_refused(span, tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(UserError, match=r"no such file: run train_diffusion\.py first"):
        load_diffusion(path, DIMENSION)
    save_diffusion(span, path)
    with pytest.raises(UserError, match=r"networks of 40 weights, not 41"):
        load_diffusion(path, DIMENSION + 1)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="damaged"):
        load_diffusion(path, DIMENSION)
    good = {"model": "SpanDiffusion", "sizes": span.sizes, "state_dict": span.state_dict()}
    for foreign in (
        nn.Linear(2, 2).state_dict(),
        [1],
        torch.zeros(2),
        good | {"model": "GAN"},
        good | {"sizes": {"dimension": "many"}},
        good | {"sizes": span.sizes | {"hidden": 17}},
        good | {"state_dict": {}},
        good | {"state_dict": 3},
    ):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="not a saved diffusion model"):
            load_diffusion(path, DIMENSION)
    span.targets[0, 0] = float("nan")
    save_diffusion(span, path)
    with pytest.raises(UserError, match="NaN"):
        load_diffusion(path, DIMENSION)

"""The synthesiser: `SimpleWeightSpaceDiffusion`, how it is trained in the span of its data, rolled out, saved, loaded.

Design document, section 2.2. The model maps the flat weights of a network after epoch N, and N, to those after N + 1.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from scripting import UserError, load_file, refused_as, save_tensors

LARGEST = 1e15  # weight of a generated network, with which its scores can still be computed


def time_network(time_dim: int) -> nn.Sequential:
    """The time-embedding network: steps [batch, 1] -> [batch, time_dim]."""
    return nn.Sequential(nn.Linear(1, time_dim), nn.ReLU(), nn.Linear(time_dim, time_dim))


def main_network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The main MLP with two hidden layers: [batch, inputs] -> [batch, outputs]."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class SimpleWeightSpaceDiffusion(nn.Module):
    """An MLP over the flat weight vector (design document, section 2.2.1).

    Inputs and outputs are standardised: each coordinate by its mean over the training pairs, all of them by one scale.
    The means and scales are buffers, so they are saved with the model. So is `last_step`, the latest recorded step:
    later ones are treated as that one, because the model knows no later transition.
    """

    def __init__(self, dimension: int, time_dim: int = 128, hidden: int = 512):
        super().__init__()
        self.sizes = {"dimension": dimension, "time_dim": time_dim, "hidden": hidden}
        self.seconds: dict[str, float] = {}  # what the model cost: "recording" its data, "training" it
        self.time_network = time_network(time_dim)
        self.main_network = main_network(dimension + time_dim, hidden, dimension)
        self.register_buffer("input_mean", torch.zeros(dimension))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("output_mean", torch.zeros(dimension))
        self.register_buffer("output_scale", torch.ones(()))
        self.register_buffer("last_step", torch.zeros(()))

    @property
    def dimension(self) -> int:
        """The length of the weight vectors that this model maps."""
        return self.sizes["dimension"]

    def forward(self, weights: Tensor, steps: Tensor) -> Tensor:
        """The next weights, [batch, dimension], of weights [batch, dimension] at steps [batch] or [batch, 1].

        Raises ValueError for other shapes.
        """
        if weights.ndim != 2 or weights.shape[1] != self.dimension:
            raise ValueError(f"expected weights of shape [batch, {self.dimension}], got {list(weights.shape)}")
        if steps.shape not in {(len(weights),), (len(weights), 1)}:
            raise ValueError(
                f"expected steps of shape [{len(weights)}] or [{len(weights)}, 1], got {list(steps.shape)}"
            )
        time = self.time_network(steps.reshape(-1, 1).to(weights.dtype).minimum(self.last_step))
        standardised = (weights - self.input_mean) / self.input_scale
        output = self.main_network(torch.cat([standardised, time], dim=1))
        return self.output_mean + self.output_scale * output


class SpanDiffusion(nn.Module):
    """`SimpleWeightSpaceDiffusion` in coordinates of the span of its N training pairs: N^2 work, not N * dimension.

    Let X and Y, [N, dimension], be the standardised inputs and targets, and D the dimension. The dense model's first
    layer only ever sees the N rows of X, and its last is only ever asked for the N rows of Y. The gradient of the first
    layer's weight is sum_n delta_n x_n^T, and that of the last layer's sum_n (output_n - y_n) h_n^T. So if the first
    layer starts as A X / D, and the last as Y^T C with bias Y^T c, gradient descent never leaves these forms: training
    needs only A [hidden, N], C [N, hidden] and c [N]. Of the coordinates it needs only two N x N Gram matrices:

        first layer on a training input:        A (X x_n / D) = A k_n              with  K = X X^T / D
        output minus target, as coefficients:   e_n = C h_n + c - unit vector n
        mean squared error over all D:          e_n^T G e_n                        with  G = Y Y^T / D

    `expand` multiplies the forms out into the dense model, which computes the same function of any weights.
    """

    def __init__(self, dimension: int, pairs: int, time_dim: int = 128, hidden: int = 512):
        super().__init__()
        self.sizes = {"dimension": dimension, "pairs": pairs, "time_dim": time_dim, "hidden": hidden}
        self.seconds: dict[str, float] = {}
        self.time_network = time_network(time_dim)
        self.main_network = main_network(pairs + time_dim, hidden, pairs)
        # At first every output is the mean target.
        nn.init.zeros_(self.main_network[-1].weight)
        nn.init.zeros_(self.main_network[-1].bias)
        for name, shape in {
            "inputs": (pairs, dimension), "input_mean": (dimension,), "input_scale": (),
            "targets": (pairs, dimension), "output_mean": (dimension,), "output_scale": (), "steps": (pairs,),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.empty(shape))

    @classmethod
    def of_runs(cls, runs: list[Tensor], time_dim: int = 128, hidden: int = 512) -> "SpanDiffusion":
        """An untrained model for all consecutive pairs of `runs`, each [epochs + 1, dimension].

        Raises ValueError unless every run has two epochs or more and all have the same dimension.
        """
        if not runs or any(run.ndim != 2 or len(run) < 2 or run.shape[1] != runs[0].shape[1] for run in runs):
            raise ValueError("expected runs of shape [epochs + 1, dimension] with at least two epochs each")
        pairs, dimension = sum(len(run) - 1 for run in runs), runs[0].shape[1]
        model = cls(dimension, pairs, time_dim, hidden).to(runs[0])
        model.inputs, model.input_mean, model.input_scale = standardise(torch.cat([run[:-1] for run in runs]))
        model.targets, model.output_mean, model.output_scale = standardise(torch.cat([run[1:] for run in runs]))
        model.steps = torch.cat([torch.arange(len(run) - 1.0) for run in runs]).to(runs[0])
        return model

    def gram_matrices(self) -> tuple[Tensor, Tensor]:
        """K and G, each [pairs, pairs]: all that `losses` needs of the coordinates."""
        return tuple(rows @ rows.T / self.sizes["dimension"] for rows in (self.inputs, self.targets))

    def losses(self, input_gram: Tensor, target_gram: Tensor) -> tuple[Tensor, Tensor]:
        """Over all pairs and coordinates, in standardised units: the dense model's mean squared error, and its mean
        squared output, which is the distance of its predictions from the mean target."""
        time = self.time_network(self.steps[:, None])
        outputs = self.main_network(torch.cat([input_gram, time], dim=1))
        errors = outputs - torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        return tuple(((rows @ target_gram) * rows).sum(dim=1).mean() for rows in (errors, outputs))

    @torch.no_grad()
    def expand(self) -> SimpleWeightSpaceDiffusion:
        """The dense model of the same function, on the same device."""
        sizes = {name: self.sizes[name] for name in ("dimension", "time_dim", "hidden")}
        with torch.device("meta"):  # its 432 million random weights would only be thrown away
            dense = SimpleWeightSpaceDiffusion(**sizes).to(self.inputs.dtype)
        dense.to_empty(device=self.inputs.device)
        first, last = self.main_network[0], self.main_network[-1]
        pairs, dimension = self.inputs.shape
        dense_first, dense_last = dense.main_network[0], dense.main_network[-1]
        torch.mm(first.weight[:, :pairs] / dimension, self.inputs, out=dense_first.weight.data[:, :dimension])
        dense_first.weight.data[:, dimension:] = first.weight[:, pairs:]
        dense_first.bias.copy_(first.bias)
        torch.mm(self.targets.T, last.weight, out=dense_last.weight.data)
        torch.mv(self.targets.T, last.bias, out=dense_last.bias.data)
        dense.main_network[2].load_state_dict(self.main_network[2].state_dict())
        dense.time_network.load_state_dict(self.time_network.state_dict())
        for name in ("input_mean", "input_scale", "output_mean", "output_scale"):
            dense.get_buffer(name).copy_(self.get_buffer(name))
        dense.last_step.copy_(self.steps.max())
        dense.seconds = self.seconds
        return dense


def standardise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, [N, dimension], in place less their mean and over one scale; the mean, [dimension]; the scale, []."""
    mean = rows.mean(dim=0)
    rows.sub_(mean)
    scale = torch.linalg.vector_norm(rows) / rows.numel() ** 0.5
    # A single row, or equal ones, are their own mean: any scale will do.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return rows.div_(scale), mean, scale


def train_in_span(model: SpanDiffusion, epochs: int, lr: float, shrinkage: float) -> None:
    """Full-batch Adam, printing the loss about ten times. Raises UserError if it diverges.

    The loss is the mean squared error plus `shrinkage` times the mean squared output: its least value draws every
    prediction from the recorded epoch to the mean target, by shrinkage / (1 + shrinkage) of the way.
    """
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    grams = model.gram_matrices()
    for epoch in range(epochs):
        error, output = model.losses(*grams)
        loss = error + shrinkage * output
        adam.zero_grad()
        loss.backward()
        adam.step()
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs - 1:
            print(
                f"Epoch {epoch + 1:{len(str(epochs))}d}/{epochs}: Loss = {loss:.6f}, Squared Error = {error:.6f}",
                flush=True,
            )
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()} after {epoch + 1} epochs, nothing saved: lower --lr")


@torch.inference_mode()
def rollout(model: nn.Module, weights: Tensor, steps: int) -> Tensor:
    """Apply `model` `steps` times to `weights`: all states, the first included.

    `weights` [dimension] give [steps + 1, dimension]; several starts, [starts, dimension], go through the model as one
    batch and give [steps + 1, starts, dimension]. Raises UserError for weights that nothing can be computed with.
    """
    states = [torch.atleast_2d(weights)]
    for step in range(steps):
        states.append(model(states[-1], torch.full((len(states[-1]),), step, device=weights.device)))
    if not all((state.abs() < LARGEST).all() for state in states):  # nor NaN
        raise UserError("the model generates NaN, or weights beyond all measure: train it again with a lower --lr")
    return torch.stack(states).view(steps + 1, *weights.shape)


def save_diffusion(model: SimpleWeightSpaceDiffusion | SpanDiffusion, path: Path) -> None:
    """Save a model with all that rebuilds it. In the span's coordinates five pairs take 20 MB, the dense model 1.7 GB.

    Raises UserError if `path` cannot be written; an earlier file survives.
    """
    content = {"model": type(model).__name__, "sizes": model.sizes, "seconds": model.seconds}
    save_tensors(path, content | {"state_dict": model.state_dict()})


def load_diffusion(path: Path, dimension: int, device: torch.device | str = "cpu") -> SimpleWeightSpaceDiffusion:
    """The dense model saved at `path`, expanded if it was saved in the span's coordinates, in evaluation mode.

    Raises UserError if the file is missing, broken, of another kind, or of another dimension.
    """
    content = load_file(path, maker="train_diffusion.py", mmap=True)
    classes = {kind.__name__: kind for kind in (SimpleWeightSpaceDiffusion, SpanDiffusion)}
    with refused_as(f"{path}: not a saved diffusion model: make it again with train_diffusion.py"):
        if not isinstance(content, dict):
            raise TypeError("not a dictionary")
        with torch.device("meta"):
            model = classes[content["model"]](**content["sizes"])
        model.load_state_dict(content["state_dict"], assign=True)
        model.seconds = {name: float(seconds) for name, seconds in content["seconds"].items()}
    if model.sizes["dimension"] != dimension:
        raise UserError(
            f"{path}: made for networks of {model.sizes['dimension']} weights, not {dimension}: "
            "train it again with train_diffusion.py"
        )
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{path}: holds NaN or infinite weights: train it again with train_diffusion.py")
    model = model.to(device)
    return (model.expand() if isinstance(model, SpanDiffusion) else model).eval()

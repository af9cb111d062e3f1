"""Train the universal synthesiser: no recorded checkpoints, only the reward of the networks that it writes.

    python -m universal.train

draws at every step a random architecture, a random init of it and a batch of training images; the synthesiser writes
the weights, and the cross-entropy of the written network on the images, differentiated through the network, trains the
synthesiser (design document, section 4.1.3). After a quarter of the steps, networks with convolutions are written in
pairs from two inits and rewarded for the mean of their probabilities, so that they do not all make the same errors.
Killed, the same command goes on from its last checkpoint.

    torchrun --nproc-per-node=2 -m universal.train

trains on several processes or machines, each with its own architectures, inits and images.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripting import (
    UserError,
    add_data_options,
    add_training_options,
    load_file,
    number,
    option_parser,
    resume_training,
    run_script,
    run_to_end,
    save_training,
    start_processes,
)
from target_cnn import Dataset, fast_bf16, score, scoring_data, training_data
from universal.evaluation.networks import EVALUATED, EVALUATED_SHAPES
from universal.mnist import IMAGE_SIDE
from universal.model.synthesizer import (
    MAKER,
    SYNTHESIZER,
    GraphWeightSynthesizer,
    fresh_init,
    load_synthesizer,
    save_synthesizer,
)
from universal.reading.graph import ComputationGraph
from universal.training.architectures import FAMILIES, draw_architecture

AVERAGE_DECAY = 0.995  # of the exponential moving average
TASK_LEARNING_RATE = 5  # that of the probes, their labels and concepts, and of the router, relative to the networks'
REPORTED = {"TargetCNN": "TargetCNN", "MLP": "MLP 784-256-128-10", "8 conv": "8 convolutions, global pooling"}
SHARPNESSES = (1, 2, 4, 8)  # of the router's choice
EARLIER_STEPS = {0: 16, 1: 2, 2: 2}  # how often to start from weights that so many steps have written before

Writing = Callable[[ComputationGraph, dict[str, Tensor]], dict[str, Tensor]]  # (graph, init) -> new weights


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the universal synthesiser on random architectures.", seed=0)
    parser.add_argument("--steps", type=number(int, 1, 10**8), default=5_000, help="architectures drawn, per process")
    parser.add_argument("--batch-size", type=number(int, 1, 10_000), default=128, help="images of the first steps")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--probes", type=number(int, 10, 10_000), default=300, help="learned images")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: fp32 on a CPU, else the faster"
    )
    parser.add_argument(
        "--start-from", type=Path, nargs="+", default=[], metavar="FILE",
        help="a synthesiser, or the state of a training, to train on from; of several, the experts of all of them "
        "(default: nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--kinds", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="of networks (default: all)"
    )
    parser.add_argument(
        "--pairs-from", type=number(float, 0, 1), default=0.25, metavar="SHARE",
        help="of the steps, after which networks with convolutions are written in pairs; 1: never",
    )  # fmt: skip
    add_training_options(parser, report_every=250, checkpoint="universal_training.pth", out=SYNTHESIZER)
    add_data_options(parser)
    parser.set_defaults(validation=2000)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rank, processes = start_processes(options.device)
    training = Training(options, rank, processes)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in training.synthesizer.parameters())
        precision = "bf16" if training.use_bf16 else "fp32"
        print(f"Using device: {options.device}, precision: {precision}, processes: {processes}")
        print(f"Training a synthesiser of {parameters:,} parameters for {options.steps} steps", flush=True)
    training.resume()
    run_to_end(training, options.steps, options.report_every, rank)
    if rank == 0:
        synthesizer = training.average.module.cpu()
        seconds = training.earlier_seconds + training.seconds
        synthesizer.seconds = {"recording": 0.0, "training": seconds}  # nothing is recorded
        save_synthesizer(synthesizer, options.out)
        options.checkpoint.unlink(missing_ok=True)
        print(f"Trained in {training.seconds / 60:.1f} min")
        print(f"Synthesiser saved to {options.out}", flush=True)
    if processes > 1:
        dist.destroy_process_group()


class Reward(nn.Module):
    """What the networks that a synthesiser writes are worth."""

    def __init__(self, synthesizer: GraphWeightSynthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    def forward(
        self, graph: ComputationGraph, inits: list[dict], step: int, images: Tensor, labels: Tensor,
        batch_statistics: bool = False,
    ) -> Tensor:  # fmt: skip
        """The cross-entropy of the mean probabilities of the networks written from `inits`, nats per image.

        With `batch_statistics` their norms use those of the images, as in training.
        """
        log_probabilities = []
        for init in inits:
            with torch.autocast(images.device.type, enabled=False):
                weights = self.synthesizer(graph, init, step)
            logits = graph.run(images, weights, batch_statistics)
            log_probabilities.append(logits.float().log_softmax(1))
        return F.nll_loss(torch.stack(log_probabilities).logsumexp(0) - math.log(len(inits)), labels)


class Training:
    """The state of a training: everything that a step changes, and how it is saved and restored."""

    def __init__(self, options: argparse.Namespace, rank: int, processes: int):
        self.options, self.rank, self.processes = options, rank, processes
        self.data = training_data(options.data, options.validation, options.device)
        self.validation = scoring_data(options.data, options.validation, options.device)
        # On a CPU the layers are so small that bf16 saves nothing, even where the hardware has it.
        faster = options.device.type != "cpu" and fast_bf16(options.device)
        self.use_bf16 = options.precision == "bf16" or (options.precision == "auto" and faster)
        torch.manual_seed(options.seed)
        earlier = [earlier_synthesizer(path) for path in options.start_from]
        self.earlier_seconds = sum(synthesizer.seconds.get("training", 0.0) for synthesizer in earlier)
        if earlier:
            self.synthesizer = mixture(earlier)
        else:
            self.synthesizer = GraphWeightSynthesizer(options.probes)
            first = first_of_each_class(self.data, options.probes)
            self.synthesizer.task.start_from(first.images, first.labels)
        self.synthesizer.to(options.device).train()
        self.average = AveragedModel(self.synthesizer, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
        # Parallel processes average their gradients; layers of a kind that no process drew have none.
        self.parallel = (
            DistributedDataParallel(Reward(self.synthesizer), find_unused_parameters=True)
            if processes > 1
            else Reward(self.synthesizer)
        )
        task = [parameter for expert in self.synthesizer.experts for parameter in expert.task.data()]
        task += self.synthesizer.router.parameters()
        networks = [p for p in self.synthesizer.parameters() if all(p is not other for other in task)]
        self.groups = [networks, task]
        rates = [options.lr, options.lr * TASK_LEARNING_RATE]
        self.adam = torch.optim.AdamW(
            [{"params": networks, "weight_decay": 1e-4}, {"params": task, "weight_decay": 0.0}],
            betas=(0.95, 0.99),
            fused=True,
        )
        warm_up = 0.1 if options.steps > 10 else 0.0  # a tenth of 10 steps, no step at all, is divided by
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adam, rates, total_steps=options.steps, pct_start=warm_up, cycle_momentum=False
        )
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")
        self.pace = 0.0  # seconds a step, of late

    def run(self, until: int) -> None:
        """Train up to step `until`. Raises UserError if a loss is not finite, or nothing can be written."""
        start, losses, first = time.perf_counter(), [], self.step
        while self.step < until:
            try:
                losses.append(self.one_step())
            except torch.linalg.LinAlgError as error:  # weights so large that no regression can be solved
                raise UserError(
                    f"training diverged at step {self.step}, nothing saved since the last report: lower --lr"
                ) from error
            self.step += 1
        self.loss = torch.stack(losses).mean().item()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.pace = seconds / (self.step - first)
        if not math.isfinite(self.loss):
            raise UserError(f"the loss is not finite after {self.step} steps, nothing saved: lower --lr")

    def one_step(self) -> torch.Tensor:
        """Write a random network from a random init, and learn from its loss, which is returned."""
        options = self.options
        # A seed of its own for every step and process: a resumed training draws what the killed one would have drawn.
        drawn = random.Random(f"{options.seed} {self.step} {self.rank}")
        torch.manual_seed(drawn.getrandbits(31))
        network = draw_architecture(drawn, refused=EVALUATED_SHAPES, families=options.kinds, colour=True)
        graph = ComputationGraph(network.to(options.device, memory_format=torch.channels_last))
        (earlier,) = drawn.choices(list(EARLIER_STEPS), EARLIER_STEPS.values())
        convolutional = graph.convolutional
        # Two networks that are rewarded together learn to err differently; before they are any good, that is a burden.
        pair = convolutional and earlier == 0 and self.step >= options.steps * options.pairs_from
        inits = [self.draw_init(graph, drawn, earlier) for _ in range(2 if pair else 1)]

        # The better the networks, the fewer images still say something about them: three times as many in the end.
        # Networks without convolutions cost so little that they can be rewarded on more.
        share = 2 / 3 if pair else 1 if convolutional else 3
        count = options.batch_size * (1 + 2 * self.step / options.steps) * share
        batch = torch.randint(len(self.data.labels), (round(count),))
        images, labels = self.data[batch.to(options.device)]
        if len(graph.layers) > 1:  # a linear classifier cannot see through a distortion
            images = distorted(images, 1.5 if convolutional else 1.0)
        images = images.to(memory_format=torch.channels_last)
        # Running statistics, which the probes give, are to be those of the images: networks must work with both.
        batch_statistics = bool(graph.norms) and drawn.random() < 0.5
        with torch.autocast(options.device.type, dtype=torch.bfloat16, enabled=self.use_bf16):
            reward = self.parallel(graph, inits, min(earlier, 1), images, labels, batch_statistics)
        loss = (reward + 0.02).log()  # lets good and bad architectures weigh alike
        self.adam.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(group, 1.0) for group in self.groups]
        if torch.stack(norms).isfinite().all():  # one network whose neurons are all alike must not spoil the rest
            self.adam.step()
        self.schedule.step()
        self.average.update_parameters(self.synthesizer)
        return reward.detach()

    def draw_init(self, graph: ComputationGraph, drawn: random.Random, earlier: int) -> dict[str, Tensor]:
        """A random init of `graph`, or what so many `earlier` generative steps make of it."""
        init = fresh_init(graph, drawn.getrandbits(31), self.options.device)
        with torch.no_grad():
            for step in range(earlier):
                init |= self.synthesizer(graph, init, min(step, 1))
        return init

    def report(self) -> None:
        """Print the progress, with the accuracy on validation images of two networks that are never trained on."""
        accuracies = []
        for name, title in REPORTED.items():
            torch.manual_seed(self.options.seed)
            network = self.average.module.synthesize(EVALUATED[title]().to(self.options.device))
            accuracies.append(f"{score(network, self.validation).accuracy_percent:5.2f}% ({name})")
        minutes = self.pace * (self.options.steps - self.step) / 60
        print(
            f"Step {self.step:{len(str(self.options.steps))}d}/{self.options.steps}: Loss = {self.loss:.4f}, "
            f"Validation Accuracy = {', '.join(accuracies)}, Time Left = {minutes:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        """What a training that goes on must share with the one that was interrupted."""
        names = ("seed", "steps", "batch_size", "lr", "kinds", "pairs_from", "validation")
        return {name: getattr(self.options, name) for name in names} | {
            "processes": self.processes, "use_bf16": self.use_bf16,
            "start_from": [str(path) for path in self.options.start_from], "synthesizer": self.synthesizer.settings,
        }  # fmt: skip

    def parts(self) -> dict:
        """What has a state_dict."""
        return {"synthesizer": self.synthesizer, "average": self.average, "adam": self.adam, "schedule": self.schedule}

    def save(self) -> None:
        """Save the state. Raises UserError if it cannot be written."""
        save_training(self.options.checkpoint, self.settings(), self.step, self.seconds, self.parts())

    def resume(self) -> None:
        """Go on from the saved state, if there is one, else fit the router of a new mixture.

        Raises UserError if the state is broken or of other options.
        """
        path, start = self.options.checkpoint, time.perf_counter()
        self.step, self.seconds = resume_training(path, self.settings(), self.parts(), MAKER)
        if self.step and self.rank == 0:
            print(f"Going on from step {self.step}, saved in {path}", flush=True)
        if not self.step and len(self.options.start_from) > 1:
            if self.rank == 0:
                print("Fitting the router on random networks, which takes minutes", flush=True)
            start_router(self.synthesizer.eval(), self.data, self.options.seed)
            self.synthesizer.train()
            self.seconds = time.perf_counter() - start


def earlier_synthesizer(path: Path) -> GraphWeightSynthesizer:
    """The synthesiser saved at `path`, `widened` to what new ones have, or the average of the training whose state is
    saved there.

    Raises UserError if the file is neither.
    """
    content = load_file(path, maker=MAKER)
    if not isinstance(content, dict) or "states" not in content:
        return widened(load_synthesizer(path))
    try:
        average = AveragedModel(GraphWeightSynthesizer(**content["settings"]["synthesizer"]))
        average.load_state_dict(content["states"]["average"])
        average.module.seconds = {"recording": 0.0, "training": float(content["progress"]["seconds"])}
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: neither a synthesiser nor the state of a training: give another file") from error
    return average.module


def mixture(synthesizers: list[GraphWeightSynthesizer]) -> GraphWeightSynthesizer:
    """A synthesiser of all the experts of several, which each network gets equal shares of, until that is learned.

    Raises UserError if their sizes differ.
    """
    first, *others = synthesizers
    if not others:
        return first
    experts = [expert for synthesizer in synthesizers for expert in synthesizer.experts]
    mixed = GraphWeightSynthesizer(**first.settings | {"experts": len(experts)})
    try:
        for expert, earlier in zip(mixed.experts, experts, strict=True):
            expert.load_state_dict(earlier.state_dict())
    except RuntimeError as error:
        raise UserError("--start-from: experts of different sizes: give synthesisers with equal settings") from error
    return mixed


def start_router(
    synthesizer: GraphWeightSynthesizer, data: Dataset, seed: int, networks: int = 600, images: int = 512
) -> None:
    """Let the router choose the expert that writes a network best, as measured on random `networks`.

    By logistic regression, in which a network weighs as much as the choice matters for its loss, up to a limit. Learned
    from equal shares by the gradient of the reward alone, shares hardly come to differ between networks. How sharp the
    choice is to be is then tried on a quarter as many: halfway between experts may lie worse ones.
    """
    about, losses = tried(list(synthesizer.experts), synthesizer, data, seed, "router", networks, images)
    best, second = losses.topk(2, largest=False).values.T
    matters, choice = (second - best).clamp(max=0.3), losses.argmin(1)
    router = synthesizer.router
    optimizer = torch.optim.LBFGS(router.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        wrong = F.cross_entropy(router(about), choice, reduction="none")
        total = (matters * wrong).mean() + 1e-4 * router.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)

    def sharpened(sharpness: int) -> Writing:
        scaled = {f"router.{name}": sharpness * parameter for name, parameter in router.named_parameters()}
        return lambda graph, init: functional_call(synthesizer, scaled, (graph, init))

    writers = [sharpened(sharpness) for sharpness in SHARPNESSES]
    _, losses = tried(writers, synthesizer, data, seed, "sharpness", -(-networks // 4), images)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter *= SHARPNESSES[losses.mean(0).argmin()]


@torch.no_grad()
def tried(
    writers: list[Writing], synthesizer: GraphWeightSynthesizer, data: Dataset, seed: int, purpose: str, networks: int,
    images: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the router knows of random networks, [networks, DESCRIPTION], and the logarithms of their losses when each
    of the `writers` writes them, [networks, writers]. Each `purpose` has networks of its own."""
    draw = random.Random(f"{seed} {purpose}")
    torch.manual_seed(seed)
    about, losses = [], []
    for _ in range(networks):
        network = draw_architecture(draw, refused=EVALUATED_SHAPES, colour=True)
        graph = ComputationGraph(network.to(data.images.device, memory_format=torch.channels_last))
        init = fresh_init(graph, draw.getrandbits(31), data.images.device)
        some = data[torch.randint(len(data.labels), (images,))]
        for write in writers:
            try:
                losses.append(F.cross_entropy(graph.run(some.images, write(graph, init)), some.labels).item())
            except torch.linalg.LinAlgError:  # activations so large that no regression can be solved
                losses.append(math.inf)
        about.append(synthesizer.description(graph))
    losses = torch.tensor(losses, device=data.images.device).view(networks, -1)
    return torch.stack(about), (losses.nan_to_num(10.0, posinf=10.0) + 0.02).log()


def widened(synthesizer: GraphWeightSynthesizer) -> GraphWeightSynthesizer:
    """The same function with at least as many hidden units as a new synthesiser has: nothing reads those added, yet."""
    wider = GraphWeightSynthesizer(**synthesizer.settings | {"hidden": GraphWeightSynthesizer().settings["hidden"]})
    if wider.settings["hidden"] <= synthesizer.settings["hidden"]:
        return synthesizer
    state = wider.state_dict()
    for name, old in synthesizer.state_dict().items():
        new = state[name]
        if new.shape[1:] != old.shape[1:]:
            new[:, old.shape[1] :] = 0
        new[tuple(map(slice, old.shape))] = old
    wider.load_state_dict(state)
    wider.seconds = synthesizer.seconds
    return wider


def distorted(images: Tensor, strength: float) -> Tensor:
    """Three quarters of `images` [N, 1, 28, 28] under random affine maps, the rest as they are.

    A `strength` of 1 scales by up to a tenth, shears and turns by up to 9 degrees and shifts by up to a pixel. What all
    written networks share is learned from many passes over the training images, and would fit these too closely.
    """
    count = len(images) * 3 // 4
    largest = torch.tensor([[0.1, 0.15, 2 / IMAGE_SIDE], [0.15, 0.1, 2 / IMAGE_SIDE]])  # half a side is 1
    maps = torch.eye(2, 3) + strength * largest * (2 * torch.rand(count, 2, 3) - 1)
    grid = F.affine_grid(maps.to(images), [count, *images.shape[1:]], align_corners=False)
    background = images.min()  # grid_sample fills up with zeros
    moved = F.grid_sample(images[:count] - background, grid, align_corners=False) + background
    return torch.cat([moved, images[count:]])


def first_of_each_class(data: Dataset, count: int) -> Dataset:
    """`count` images, the classes in turn."""
    per_class = [(data.labels == label).nonzero()[:, 0] for label in data.labels.unique()]
    rounds = -(-count // len(per_class))
    return data[torch.stack([indices[:rounds] for indices in per_class], 1).flatten()[:count]]


if __name__ == "__main__":
    run_script(main)

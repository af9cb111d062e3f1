"""Training a synthesiser on random architectures: its reward, its state, and what a step does."""

import argparse
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripting import UserError
from target_cnn import Dataset, fast_bf16, score, scoring_data, training_data
from universal.evaluation.networks import EVALUATED_SHAPES
from universal.model.synthesizer import GraphWeightSynthesizer, Unwritable, fresh_init, load_synthesizer
from universal.reading.graph import ComputationGraph
from universal.training.architectures import draw_architecture

AVERAGE_DECAY = 0.995  # of the exponential moving average
TASK_LEARNING_RATE = 5  # that of the probes, their labels and concepts, and of the router, relative to the networks'


class Reward(nn.Module):
    """What the networks that a synthesiser writes are worth."""

    def __init__(self, synthesizer: GraphWeightSynthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    def forward(
        self, graph: ComputationGraph, init: dict[str, Tensor], images: Tensor, labels: Tensor,
        batch_statistics: bool = False,
    ) -> Tensor:  # fmt: skip
        """The cross-entropy of the network written from `init`, nats per image.

        With `batch_statistics` its norms use those of the images, as in training.
        """
        with torch.autocast(images.device.type, enabled=False):
            weights = self.synthesizer(graph, init)
        return F.cross_entropy(graph.run(images, weights, batch_statistics).float(), labels)


class Training:
    """The state of a training, for `run_to_end`: everything that a step changes.

    Raises UserError if the data, or the synthesiser to start from, cannot be read.
    """

    def __init__(self, options: argparse.Namespace, rank: int, processes: int):
        self.options, self.rank, self.processes, self.steps = options, rank, processes, options.steps
        self.data = training_data(options.data, options.validation, options.device)
        self.validation = scoring_data(options.data, options.validation, options.device)
        self.inputs, self.classes = self.data.images.shape[1:], len(self.data.labels.unique())
        # On a CPU the layers are so small that bf16 saves nothing, even where the hardware has it.
        faster = options.device.type != "cpu" and fast_bf16(options.device)
        self.use_bf16 = options.precision == "bf16" or (options.precision == "auto" and faster)
        torch.manual_seed(options.seed)
        if options.start_from:
            self.synthesizer = load_synthesizer(options.start_from)
        else:
            self.synthesizer = GraphWeightSynthesizer(options.probes)
            first = first_of_each_class(self.data, options.probes)
            self.synthesizer.task.start_from(first.images, first.labels)
        self.earlier_seconds = self.synthesizer.seconds.get("training", 0.0)
        self.synthesizer.to(options.device).train()
        self.average = AveragedModel(self.synthesizer, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
        # Parallel processes average their gradients; layers of a kind that no process drew have none.
        self.reward = (
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

    def run(self, until: int) -> None:
        """Train up to step `until`. Raises UserError if a loss is not finite, or nothing can be written."""
        losses = []
        while self.step < until:
            try:
                losses.append(self.one_step())
            except torch.linalg.LinAlgError as error:  # weights so large that no regression can be solved
                raise UserError(
                    f"training diverged at step {self.step}, nothing saved since the last report: lower --lr"
                ) from error
            self.step += 1
        self.loss = torch.stack(losses).mean().item()
        if not math.isfinite(self.loss):
            raise UserError(f"the loss is not finite after {self.step} steps, nothing saved: lower --lr")

    def one_step(self) -> Tensor:
        """Write a random network from a random init, and learn from its loss, which is returned."""
        options = self.options
        # A seed of its own for every step and process: a resumed training draws what the killed one would have drawn.
        drawn = random.Random(f"{options.seed} {self.step} {self.rank}")
        torch.manual_seed(drawn.getrandbits(31))
        network = draw_architecture(
            drawn, self.inputs, self.classes, EVALUATED_SHAPES, options.families, colour=self.inputs[0] == 1
        )
        graph = ComputationGraph(network.to(options.device, memory_format=torch.channels_last))
        init = fresh_init(graph, drawn.getrandbits(31), options.device)
        images, labels = self.draw_images(graph)
        # Running statistics, which the probes give, are to be those of the images: networks must work with both.
        batch_statistics = bool(graph.norms) and drawn.random() < 0.5
        with torch.autocast(options.device.type, dtype=torch.bfloat16, enabled=self.use_bf16):
            reward = self.reward(graph, init, images, labels, batch_statistics)
        loss = (reward + 0.02).log()  # lets good and bad architectures weigh alike
        self.adam.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(group, 1.0) for group in self.groups]
        if torch.stack(norms).isfinite().all():  # one network whose neurons are all alike must not spoil the rest
            self.adam.step()
        self.schedule.step()
        self.average.update_parameters(self.synthesizer)
        return reward.detach()

    def draw_images(self, graph: ComputationGraph) -> Dataset:
        """A batch of training images, as a network is to be rewarded on them."""
        # The better the networks, the fewer images still say something about them: three times as many in the end.
        # Networks without convolutions cost so little that they can be rewarded on more.
        count = self.options.batch_size * (1 + 2 * self.step / self.steps) * (1 if graph.convolutional else 3)
        batch = torch.randint(len(self.data.labels), (round(count),))
        images, labels = self.data[batch.to(self.options.device)]
        if len(graph.layers) > 1:  # a linear classifier cannot see through a distortion
            images = distorted(images, 1.5 if graph.convolutional else 1.0)
        return Dataset(images.to(memory_format=torch.channels_last), labels)

    def report(self, minutes_left: float) -> None:
        """Print the progress, with the accuracy on validation images of the same network of each family every time."""
        accuracies = []
        for family in self.options.families:
            torch.manual_seed(self.options.seed)
            network = draw_architecture(random.Random(0), self.inputs, self.classes, EVALUATED_SHAPES, [family])
            try:
                written = self.average.module.synthesize(network.to(self.options.device))
                accuracy = score(written, self.validation).accuracy_percent
            except Unwritable:  # which may be learned yet
                accuracy = float("nan")
            accuracies.append(f"{accuracy:5.2f}% ({family})")
        print(
            f"Step {self.step:{len(str(self.steps))}d}/{self.steps}: Loss = {self.loss:.4f}, "
            f"Validation Accuracy = {', '.join(accuracies)}, Time Left = {minutes_left:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        """What a training that goes on must share with the one that was interrupted."""
        names = ("seed", "steps", "batch_size", "lr", "families", "validation")
        return {name: getattr(self.options, name) for name in names} | {
            "processes": self.processes, "use_bf16": self.use_bf16, "start_from": str(self.options.start_from),
            "synthesizer": self.synthesizer.settings,
        }  # fmt: skip

    def parts(self) -> dict:
        """What has a state_dict."""
        return {"synthesizer": self.synthesizer, "average": self.average, "adam": self.adam, "schedule": self.schedule}


def distorted(images: Tensor, strength: float) -> Tensor:
    """Three quarters of `images` [N, C, H, W] under random affine maps, the rest as they are.

    A `strength` of 1 scales by up to a tenth, shears and turns by up to 9 degrees and shifts by up to a pixel. What all
    written networks share is learned from many passes over the training images, and would fit these too closely.
    """
    count = len(images) * 3 // 4
    height, width = images.shape[-2:]
    largest = torch.tensor([[0.1, 0.15, 2 / width], [0.15, 0.1, 2 / height]])  # half a side is 1
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

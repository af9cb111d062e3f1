"""Training what is learned of writing layers, over random data sets and random architectures: what a step does."""

import argparse
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripting import UserError
from target_cnn import Dataset
from universal.evaluation.networks import EVALUATED_SHAPES
from universal.model.synthesizer import GraphWeightSynthesizer, fresh_init, load_synthesizer, trunk_end
from universal.reading.graph import ComputationGraph
from universal.rules.features import features_of
from universal.rules.judging import judged
from universal.rules.trunk import Trunk, has_learned
from universal.training.architectures import FAMILIES, draw_architecture
from universal.training.tasks import HELD_OUT_KINDS, KINDS, Task, draw_task, own_kind

AVERAGE_DECAY = 0.99  # of the exponential moving average
SUPPORT, QUERY = 192, 128  # images that the last layer is regressed on, and that it is judged by
PROBES = (96, 160)  # of the former, what layers are written from
ORDINARY, LEAST_SHARE = 4e6, 0.4  # multiplications for an image; of more, fewer images are looked at
NARROW, FIRST = 0.4, ({"mnist": KINDS["mnist"]}, ["ordinary"])  # of the steps, in which fewer and fewer draws are such
LARGEST_GRADIENT = 1.0  # of one network: some are a hundred times larger than others
LEARNED = [family for family in FAMILIES if family not in ("mlp", "tokens")]  # rules write the others


def reward(
    synthesizer: GraphWeightSynthesizer, graph: ComputationGraph, init: dict[str, Tensor], task: Task, probes: int
) -> tuple[Tensor, Tensor]:
    """Of a ridge regression on what the layers that a synthesiser writes, from so many `probes`, make of the task's
    images: the cross-entropy on those that it has not seen, nats per image, and the share of them that is right."""
    end, (images, labels) = trunk_end(graph), task.train
    one_hot = F.one_hot(labels, task.classes).float()
    written = Trunk(graph, init, images, one_hot, synthesizer, probes).write_up_to(end)
    images = torch.cat([images, task.test.images])
    features = features_of(end, graph.inputs_of(end, images, init | written), len(images))
    support, query = features.split([len(labels), len(task.test.labels)])
    return judged(support, one_hot, query, task.test.labels)


class Training:
    """The state of a training, for `run_to_end`: everything that a step changes. With one's `own` images it learns from
    data sets of these alone. Raises UserError if these are all alike, or all of one class."""

    def __init__(self, options: argparse.Namespace, rank: int, processes: int, own: Dataset | None = None):
        self.options, self.rank, self.processes, self.steps = options, rank, processes, options.steps
        self.kinds = KINDS if "all" in options.tasks else {kind: KINDS[kind] for kind in options.tasks}
        if own is not None:
            if own.images.min() == own.images.max():
                raise UserError(f"{options.data}: all pixels are of one value: give images that differ")
            if len(own.labels.unique()) < 2:
                raise UserError(f"{options.data}: one class alone has images to learn from: give more of the others")
            self.kinds = {"own": own_kind(own)}
        torch.manual_seed(options.seed)
        start, self.from_nothing = options.start_from, options.start_from is None
        self.synthesizer = load_synthesizer(start) if start else GraphWeightSynthesizer()
        self.earlier_seconds = self.synthesizer.seconds.get("training", 0.0)
        self.synthesizer.to(options.device).train()
        self.average = AveragedModel(self.synthesizer, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
        self.adam = torch.optim.AdamW(self.synthesizer.parameters(), weight_decay=1e-4, betas=(0.95, 0.99), fused=True)
        warm_up = 0.1 if options.steps > 10 else 0.0  # a tenth of 10 steps, no step at all, is divided by
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adam, options.lr, total_steps=options.steps, pct_start=warm_up, cycle_momentum=False
        )
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")

    def run(self, until: int) -> None:
        """Train up to step `until`. Raises UserError if nothing can be written or learned."""
        losses = []
        while self.step < until:
            try:
                losses.append(self.one_step())
            except torch.linalg.LinAlgError as error:  # weights so large that no regression can be solved
                raise UserError(
                    f"training diverged at step {self.step}: lower --lr, and delete {self.options.checkpoint} if it is "
                    "there"
                ) from error
            self.step += 1
        self.loss = torch.stack(losses).mean().item()

    def drawn(self, draw: random.Random, kinds, families) -> tuple[Task, ComputationGraph]:
        """A data set, and a network for it of which something is learned."""
        task = draw_task(draw, SUPPORT, QUERY, kinds).to(self.options.device)
        torch.manual_seed(draw.getrandbits(31))
        while True:
            network = draw_architecture(draw, task.train.images.shape[1:], task.classes, EVALUATED_SHAPES, families)
            network = network.to(self.options.device, memory_format=torch.channels_last)
            graph = ComputationGraph(network, task.train.images[:2].cpu())
            if has_learned(graph):
                return task, graph

    def one_step(self) -> Tensor:
        """Learn from random networks for random data sets, from random inits: the mean of their losses, returned."""
        losses = []
        self.adam.zero_grad()
        for place in range(self.options.networks):
            # A seed of its own for every network: a resumed training draws what the killed one would have drawn.
            draw = random.Random(f"{self.options.seed} {self.step} {self.rank} {place}")
            narrow = self.from_nothing and draw.random() > self.step / (NARROW * self.steps)
            task, graph = self.drawn(draw, *(FIRST if narrow else (self.kinds, self.options.families)))
            init = fresh_init(graph, draw.getrandbits(31), self.options.device)
            share = min(1.0, max(LEAST_SHARE, ORDINARY / graph.multiplications))
            task = task._replace(train=task.train[: round(share * SUPPORT)], test=task.test[: round(share * QUERY)])
            found, _ = reward(self.synthesizer, graph, init, task, round(share * draw.randint(*PROBES)))
            loss = (found + 0.02).log()  # lets good and bad architectures weigh alike
            gradients = torch.autograd.grad(loss, list(self.synthesizer.parameters()), allow_unused=True)
            size = torch.stack([each.norm() for each in gradients if each is not None]).norm()
            if not size.isfinite():  # one network whose neurons are all alike must not spoil the rest
                continue
            for parameter, gradient in zip(self.synthesizer.parameters(), gradients, strict=True):
                if gradient is not None:
                    gradient = gradient * (LARGEST_GRADIENT / size).clamp(max=1)
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            losses.append(loss.detach())
        if not losses:
            raise torch.linalg.LinAlgError("no network has a finite gradient")
        if self.processes > 1:
            self.average_gradients()
        self.adam.step()
        self.schedule.step()
        self.average.update_parameters(self.synthesizer)
        return torch.stack(losses).mean()

    def average_gradients(self) -> None:
        """Let every process have the mean of all their gradients. What none has learned of keeps having none, so that a
        step leaves it as it is."""
        parameters = list(self.synthesizer.parameters())
        has = torch.tensor([each.grad is not None for each in parameters], device=parameters[0].device).float()
        dist.all_reduce(has)
        for parameter, count in zip(parameters, has.tolist(), strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.processes

    @torch.no_grad()
    def report(self, minutes_left: float) -> None:
        """Print the progress, with the accuracy on tasks of kinds that are never drawn, of the same networks every
        time."""
        accuracies = []
        for family in self.options.families:
            found = []
            for seed in range(8):
                draw = random.Random(seed)
                task, graph = self.drawn(draw, HELD_OUT_KINDS, [family])
                init = fresh_init(graph, 0, self.options.device)
                found.append(reward(self.average.module, graph, init, task, PROBES[1])[1].item())
            accuracies.append(f"{100 * sum(found) / len(found):5.2f}% ({family})")
        print(
            f"Step {self.step:{len(str(self.steps))}d}/{self.steps}: Loss = {self.loss:.4f}, "
            f"Held-out Accuracy = {', '.join(accuracies)}, Time Left = {minutes_left:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        """What a training that goes on must share with the one that was interrupted."""
        names = ("seed", "steps", "networks", "lr", "families", "tasks")
        return {name: getattr(self.options, name) for name in names} | {
            "processes": self.processes, "start_from": str(self.options.start_from), "data": str(self.options.data),
            "synthesizer": self.synthesizer.settings,
        }  # fmt: skip

    def parts(self) -> dict:
        """What has a state_dict."""
        return {"synthesizer": self.synthesizer, "average": self.average, "adam": self.adam, "schedule": self.schedule}

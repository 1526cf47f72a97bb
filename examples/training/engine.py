"""The loop, for every task: Accelerate runs it on one CPU, one GPU, or many processes."""

import copy
import math
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    send_to_device,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MetricCollection
from tqdm import tqdm

from training.checkpoints import (
    alone_in,
    check_same,
    last,
    load_state,
    save_checkpoint,
    save_weights,
    write_json,
    write_picture,
)
from training.data import Data
from training.errors import TrainingError
from training.hybrids import backbone_of, param_groups
from training.settings import Settings

_NOT_JUDGED = 255
"""Of targets: what metrics leave out."""


class Task(Protocol):
    """What is learned."""

    best: str
    """Name of the metric whose largest value says which weights are kept."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch, and of how many."""
        ...

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Predictions and targets, with the images of the batch in their first dimension."""
        ...

    def metrics(self) -> MetricCollection:
        """What predictions and targets are judged by."""
        ...

    def scalars(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Results of the metrics, each a number."""
        ...

    def picture(self, batch: Any, predictions: Tensor) -> Tensor:
        """Samples with what is predicted for them, ``(3, H, W)`` in 0 to 1."""
        ...


@dataclass
class Progress:
    """Where a run is; part of its checkpoints, as JSON."""

    epoch: int = 0
    """Epochs whose steps are done."""
    step: int = 0
    """Optimizer steps of the run."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Of every epoch that was judged: all, or all but the last."""


def make_accelerator(settings: Settings) -> Accelerator:
    """What runs the loop; before the model is made, since it seeds the generators."""
    set_seed(settings.seed)
    plugin = None
    if settings.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="FULL_STATE_DICT",  # sharded ones are read with pickle
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes on CPUs would each train alone
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False),
        # A convolution behind the last block gets no gradient from a class token.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with="tensorboard",
        project_dir=str(settings.out),
        fsdp_plugin=plugin,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on accelerators only; processes on CPUs are for trying it out.
        changed = {"distributed_type": DistributedType.FSDP}
        PartialState._shared_state.update(changed)
        AcceleratorState._shared_state.update(changed, fsdp_plugin=plugin)
    if settings.fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise TrainingError(
            "--fsdp needs several processes: start with torchrun or accelerate launch"
        )
    return accelerator


class Training:
    """A run.

    Args:
        accelerator: From ``make_accelerator``.
        model: Whose trainable parameters are to be trained.
        task: What is learned.
        data: Loaders that are not prepared yet.
        settings: How to train.
        told: What else the run depends on, by option; a resumed run must have the same.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        task: Task,
        data: Data,
        settings: Settings,
        told: Mapping[str, Any],
    ):
        self.accelerator, self.task, self.settings = accelerator, task, settings
        self.order = data.order
        self.told = {**told, **asdict(settings)}
        set_seed(settings.seed, device_specific=True)  # processes drop other paths
        self.progress = Progress()
        self.steps_per_epoch = data.order.samples // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        if not self.steps_per_epoch:
            raise TrainingError(
                f"there are fewer training samples than --batch-size {settings.batch_size}: "
                f"take a smaller one"
            )
        if settings.batch_size % (settings.accumulate * accelerator.num_processes):
            raise TrainingError(
                f"expected --batch-size to be a multiple of --accumulate and number of processes, "
                f"got {settings.batch_size}, {settings.accumulate} and {accelerator.num_processes}"
            )
        if settings.grad_checkpointing:
            backbone = backbone_of(model)
            if not hasattr(backbone, "set_grad_checkpointing"):
                raise TrainingError(f"--grad-checkpointing: {type(backbone).__name__} has none")
            backbone.set_grad_checkpointing(True)
        optimizer = torch.optim.AdamW(param_groups(model, settings))
        scheduler = LambdaLR(optimizer, self._share_of_lr)
        self.average = self._average_of(model) if settings.ema else None
        self.empty = self._prepare_sharding(model) if settings.fsdp else None
        if settings.compile:
            model.compile()
        self.model, self.optimizer, self.scheduler, self.val_loader = accelerator.prepare(
            model, optimizer, scheduler, data.val
        )
        prepare = accelerator.prepare_data_loader
        self.is_stream = data.is_stream
        self.train_loader = data.train if data.is_stream else prepare(data.train)
        self._terminated = self._stopping = False
        self._saved = 0  # step of the last checkpoint

    def run(self) -> list[dict[str, float]]:
        """Train to the end, or until the process is asked to terminate.

        Returns:
            The history: losses and metrics of every epoch.

        Raises:
            TrainingError: If the loss is not finite any more.
            ResumeError: If the run in the folder has other settings.
        """
        with alone_in(self.settings.out) if self.accelerator.is_main_process else nullcontext():
            self._begin()
            with self._termination():
                while not self.finished and not self._stopping:
                    if len(self.progress.history) == self.progress.epoch:
                        self._train_epoch()
                    if len(self.progress.history) < self.progress.epoch:
                        self._judge_epoch()
            self.accelerator.end_training()
        if not self.finished:
            self.accelerator.print(
                f"stopped at step {self.progress.step} of {self.steps}: go on with --resume auto"
            )
        return self.progress.history

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, and judged."""
        return len(self.progress.history) >= self.settings.epochs

    # --- an epoch ---

    def _train_epoch(self) -> None:
        settings, progress = self.settings, self.progress
        done = progress.step - progress.epoch * self.steps_per_epoch
        self.order.begin(progress.epoch, done * settings.batch_size)
        batches = (self.steps_per_epoch - done) * settings.accumulate  # a stream has no end
        self.model.train()
        losses: list[Tensor] = []
        with tqdm(
            total=self.steps_per_epoch,
            initial=done,
            desc=f"epoch {progress.epoch + 1}/{settings.epochs}",
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            parts: list[Tensor] = []
            for batch in self._batches(batches, losses):
                parts.append(self._part(send_to_device(batch, self.accelerator.device)))
                if len(parts) < settings.accumulate:
                    continue
                losses.append(torch.stack(parts).mean())
                parts.clear()
                progress.step += 1
                bar.update()
                at_end = progress.step % self.steps_per_epoch == 0
                is_logged = progress.step % settings.log_every == 0 or at_end
                if is_logged:
                    bar.set_postfix(loss=f"{self._log(losses):.4f}")
                self._stopping = self._is_asked_to_stop(is_logged)
                due = settings.save_every and progress.step % settings.save_every == 0
                if at_end:
                    progress.epoch += 1
                if at_end or due or self._stopping:
                    self._save(losses)
                if at_end or self._stopping:
                    return

    def _batches(self, number: int, losses: list[Tensor]) -> Iterator[Any]:
        """Batches to train on; if one cannot be read, what was learned before it is saved."""
        try:
            yield from islice(self.train_loader, number if self.is_stream else None)
        except Exception:
            is_alone = self.accelerator.num_processes == 1  # or the others would have to save too
            if is_alone and self.progress.step > self._saved:
                self._save(losses)
            raise

    def _is_asked_to_stop(self, may_wait: bool) -> bool:
        """Whether SIGTERM has come.

        Args:
            may_wait: Whether several processes may wait for each other to find out.
        """
        if self.accelerator.num_processes == 1:
            return self._terminated
        return may_wait and self.accelerator.check_trigger()

    def _part(self, batch: Any) -> Tensor:
        """Forward and backward of a part of a step, and the step behind the last; the loss."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                total, count = self.task.loss(self.model, batch)
            # DDP takes the mean over processes; the loss is one over all that the batch has.
            shares = self._over_processes(count.detach().float(), "sum").clamp(min=1)
            loss = total * (accelerator.num_processes / shares)
            accelerator.backward(loss)
            if accelerator.sync_gradients and self.settings.clip_grad:
                accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients and self.average is not None:
                self.average.update_parameters(accelerator.unwrap_model(self.model))
        return self._over_processes(loss.detach(), "mean")

    def _over_processes(self, value: Tensor, how: str) -> Tensor:
        reduced: Any = self.accelerator.reduce(value, how)
        return reduced

    def _log(self, losses: list[Tensor]) -> float:
        """Log the losses since the last time, and forget them; the last of them."""
        first = self.progress.step - len(losses) + 1
        values = torch.stack(losses).tolist()
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {step}; the last checkpoint is from before: "
                    f"take a lower --lr, or --precision no"
                )
            self.accelerator.log({"train/loss": value}, step=step)
        losses.clear()
        self.accelerator.log(
            {"train/lr": self.scheduler.get_last_lr()[-1]}, step=self.progress.step
        )
        return values[-1]

    # --- evaluation ---

    def _judge_epoch(self) -> None:
        values = self.evaluate()
        if values is None:
            return
        self.progress.history.append({"epoch": self.progress.epoch, **values})
        self.accelerator.log({f"val/{k}": v for k, v in values.items()}, step=self.progress.step)
        best = max(self.progress.history, key=lambda epoch: epoch[self.task.best])
        if best is self.progress.history[-1]:
            self._save_weights()
        if self.accelerator.is_main_process:
            write_json(self.progress.history, self.settings.out / "history.json")
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            tqdm.write(f"epoch {self.progress.epoch}: {shown}")

    def evaluate(self) -> dict[str, float] | None:
        """Metrics on the validation data, of the average of the weights if there is one.

        Returns:
            None if the process is asked to terminate meanwhile.
        """
        model = self.model if self.average is None else self.average
        metrics = self.task.metrics().to(self.accelerator.device)
        model.eval()
        with torch.no_grad():
            for number, batch in enumerate(self.val_loader):
                with self.accelerator.autocast():
                    predicted, targets = self.task.predict(model, batch)
                if number == 0 and self.accelerator.is_main_process:
                    self._show(self.task.picture(batch, predicted))
                # The last batch is filled up, so that all processes have one: not counted here.
                predicted, targets = self._padded(predicted, 0), self._padded(targets, _NOT_JUDGED)
                metrics.update(*self.accelerator.gather_for_metrics((predicted, targets)))
                self._stopping = self._is_asked_to_stop(True)
                if self._stopping:
                    return None
        return self.task.scalars(metrics.compute())

    def _padded(self, maps: Tensor, value: int) -> Tensor:
        """Of the same size in all processes; pictures may have their own."""
        for dim in range(1, maps.ndim):
            padded: Any = self.accelerator.pad_across_processes(maps, dim=dim, pad_index=value)
            maps = padded
        return maps

    def _show(self, picture: Tensor) -> None:
        picture = picture.float().cpu()
        write_picture(picture, self.settings.out / "samples.png")
        for tracker in self.accelerator.trackers:
            tracker.writer.add_image("val/samples", picture, self.progress.step)

    # --- beginning, going on, ending ---

    def _begin(self) -> None:
        out = self.settings.out
        there = last(out / "checkpoints")
        if there is not None and self.settings.resume != "auto":
            raise TrainingError(
                f"{out} holds a run already: go on with --resume auto, or take another --out"
            )
        if there is not None:
            check_same(self.told, out / "settings.json", self.settings.may_change())
            self.progress = Progress(**load_state(self.accelerator, there, self.average))
            self.accelerator.print(f"going on from step {self.progress.step} of {self.steps}")
        elif self.accelerator.is_main_process:
            write_json(self.told, out / "settings.json")
        self.accelerator.wait_for_everyone()
        self._saved = self.progress.step
        again = {"purge_step": self._saved + 1}  # what is behind the checkpoint comes once more
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": again})

    def _save(self, losses: list[Tensor]) -> None:
        if losses:  # not logged yet, so not known to be finite
            self._log(losses)
        self._check_weights()
        save_checkpoint(
            self.accelerator,
            self.settings.out / "checkpoints",
            self.progress.step,
            asdict(self.progress),
            self.average,
        )
        self._saved = self.progress.step

    def _check_weights(self) -> None:
        """The last loss was of the weights before the last step; look at those behind it."""
        own = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        broken = torch.stack([~p.detach().isfinite().all() for p in own if p.numel()]).any()
        if self._over_processes(broken.float(), "sum") > 0:
            raise TrainingError(
                f"weights are not finite behind step {self.progress.step}; the last checkpoint is "
                f"from before: take a lower --lr, or --precision no"
            )

    def _save_weights(self) -> None:
        """Keep the weights that were evaluated last."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        if self.average is not None:
            model = self.average.module
        if self.empty is not None:
            # Every process takes part.
            state: dict[str, Any] = self.accelerator.get_state_dict(self.model)
            model = self.empty
            if self.accelerator.is_main_process:
                own = {key: value.clone() for key, value in state.items()}  # not parts of a buffer
                model.load_state_dict(own, assign=True)
        if self.accelerator.is_main_process:
            save_weights(model, self.settings.out / "weights", self.progress.epoch)
        self.accelerator.wait_for_everyone()

    def _average_of(self, model: nn.Module) -> AveragedModel:
        if self.settings.fsdp:
            raise TrainingError("--ema needs whole weights, which --fsdp does not keep")
        average = get_ema_multi_avg_fn(self.settings.ema)
        made = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        return made.to(self.accelerator.device)

    def _prepare_sharding(self, model: nn.Module) -> nn.Module:
        """Shard block by block; a copy without values, for whole weights to be put into again."""
        blocks = {
            type(m).__name__ for n, m in model.named_modules() if re.search(r"blocks\.\d+$", n)
        }
        plugin: Any = self.accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted(blocks) or [type(model).__name__]
        return copy.deepcopy(model).to("meta")

    @contextmanager
    def _termination(self) -> Iterator[None]:
        """Let SIGTERM end the run behind the next step, with a checkpoint."""

        def ask(*_: object) -> None:
            self._terminated = True
            self.accelerator.set_trigger()

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _share_of_lr(self, step: int) -> float:
        """Rises to 1 and falls to 0 along a cosine."""
        warmup = max(1, round(self.settings.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

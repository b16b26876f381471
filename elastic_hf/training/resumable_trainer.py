"""A [`Trainer`] whose runs cannot be ruined: whole checkpoints, one run a folder, and nothing that is not finite."""

import logging
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from .batches import SeededCollator
from .checkpoints import (
    INCOMPLETE,
    RunTotals,
    choose_checkpoint,
    find_damage,
    put_in_place,
    read_record,
    remove_old_checkpoints,
    write_record,
)
from .output_folder import lock_output_dir
from .sharding import is_sharded, load_optimizer, load_weights


logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """
    [`Trainer`] with these promises:

    - A checkpoint is whole or absent, also when the process is killed or the disk is full: it is written aside and
      then renamed, and renamed before it is removed.
    - A run that is resumed, within an epoch or after it, ends with the weights, the loss and the seconds of the whole
      run, and what its callbacks count, such as early stopping, goes on. It may be resumed with FSDP2, or without.
    - Two trainings cannot share an `output_dir`.
    - A training stops with an error at the first loss or weight that is not finite.

    Attributes:
        seconds_before (`float`, *optional*): Time that the training took before this process resumed it; `None` where
            that is not known, after resuming from a checkpoint of the stock [`Trainer`].
    """

    def __init__(self, *args, callbacks: list[TrainerCallback] | None = None, **kwargs) -> None:
        super().__init__(*args, callbacks=[*(callbacks or []), _CountFromFirstStep(self)], **kwargs)
        self.seconds_before: float | None = 0.0
        self._resumed_from: str | None = None
        self._is_writing_checkpoint = False
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Train the model, as [`Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                The checkpoint to go on from; `True` for the newest whole one in `args.output_dir`.
            args, kwargs: All other arguments of [`Trainer.train`].

        Returns:
            [`~trainer_utils.TrainOutput`]: The steps, loss and metrics of the whole run. The metrics have neither
            loss nor seconds where these are not known.

        Raises:
            ValueError: If the checkpoint is not whole, `True` finds none, or another run trains in `args.output_dir`.
            FloatingPointError: If a loss or a weight is not finite.
        """
        with lock_output_dir(self.args.output_dir) if self.args.should_save else nullcontext():
            self._resumed_from = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
            if self._resumed_from is not None and self.args.save_only_model:
                logger.warning("save_only_model keeps no optimizer: what is resumed is not the same run")
            return super().train(self._resumed_from, *args, **kwargs)

    # What a resumed run goes on with

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return trained
        self._find_best_checkpoint(Path(resume_from_checkpoint))
        was_stopped = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return (num_train_epochs, 0) if was_stopped else trained

    def _find_best_checkpoint(self, resumed_from: Path) -> None:
        """Look for the best checkpoint where it was, also in a folder that was moved. Without it, choose anew."""
        best = TrainerState.load_from_json(str(resumed_from / TRAINER_STATE_NAME)).best_model_checkpoint
        if best is None:
            return
        for checkpoint in (str(resumed_from.parent / Path(best).name), best):
            if find_damage(checkpoint) is None:
                self.state.best_model_checkpoint = checkpoint
                return
        logger.warning(f"{best}, the best checkpoint, is not whole: the best one from here on takes its place")
        self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # What callbacks have counted belongs to the run; their arguments are those given now.
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(resume_from_checkpoint) == self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if is_sharded(best) == self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or is_sharded(checkpoint) == self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_optimizer(self.model, self.optimizer, checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _count_from_first_step(self) -> None:
        self._start_time, self.seconds_before = time.time(), 0.0
        if self._resumed_from is None:
            return
        record = read_record(self._resumed_from)
        if record is None or record.totals is None:
            self.seconds_before = None
            return
        self.seconds_before = record.totals.seconds
        self._initial_global_step = 0
        self._total_loss_scalar = record.totals.logged_loss
        self._tr_loss.fill_(record.totals.unlogged_loss)
        self._globalstep_last_logged = record.totals.last_logged_step

    def _run_epoch(self, *args, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        self._epoch.fill_(epoch)
        # A loader that skips batches does not reach the sampler of one that is sharded.
        sampler = train_dataloader.batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        seed = self._data_seed()
        base = loader.base_dataloader  # of Accelerate's, which has no collator of its own
        base.collate_fn = SeededCollator(base.collate_fn, seed, self._epoch)
        if self.args.dataloader_persistent_workers:
            # A loader that is resumed starts its workers once more, for which it would draw from the global generator.
            base.generator = torch.Generator().manual_seed(seed)
        return loader

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        self._check_weights()
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            remove_old_checkpoints(Path(self._get_output_dir(trial)), 1, {Path(best)})
        output = super()._finalize_training(trial, num_train_samples, start_time - (self.seconds_before or 0.0))
        if self.seconds_before is None:
            for name in ("train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"):
                output.metrics.pop(name, None)
        return output

    # Checkpoints

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, INCOMPLETE) if self._is_writing_checkpoint else run_dir

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        self._check_weights()
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        totals = self._count_totals()
        if self.args.should_save:
            shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            free = shutil.disk_usage(run_dir).free
            error.add_note(f"{run_dir / name} is not written; {free:,} bytes are free on its disk")
            raise
        finally:
            self._is_writing_checkpoint = False
        best = f"checkpoint-{self.state.best_global_step}"
        if best == name or (run_dir / best).is_dir():
            self.state.best_model_checkpoint = str(run_dir / best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(run_dir / INCOMPLETE / name / TRAINER_STATE_NAME))
            write_record(run_dir / INCOMPLETE / name, totals)
            put_in_place(run_dir / INCOMPLETE / name)
            if self.args.save_total_limit:
                keep = {run_dir / name, Path(self.state.best_model_checkpoint or run_dir / name)}
                remove_old_checkpoints(run_dir, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock trainer pushes before the checkpoint is in its place.
        if not self._is_writing_checkpoint:
            self._push_checkpoint(checkpoint_folder)

    def _push_checkpoint(self, checkpoint_folder: str) -> None:
        super()._push_from_checkpoint(checkpoint_folder)

    def _count_totals(self) -> RunTotals | None:
        unlogged_loss = self.accelerator.gather(self._tr_loss).mean().item()
        if self.seconds_before is None:
            return None
        seconds = self.seconds_before + time.time() - self._start_time
        return RunTotals(seconds, self._total_loss_scalar, unlogged_loss, self._globalstep_last_logged)

    # What is not finite

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            self._raise_diverged(f"the loss at step {self.state.global_step + 1:,} must be finite, found {loss:g}")
        return loss

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not values.isfinite().all():
                self._raise_diverged(f"the weights after step {self.state.global_step:,} must be finite, found {name}")

    def _raise_diverged(self, finding: str) -> None:
        learning_rate = self._get_learning_rate()
        raise FloatingPointError(
            f"{finding}: the training has diverged with learning_rate {self.args.learning_rate:g}, "
            f"{learning_rate:.3g} at this step; try a lower one"
        )


class _CountFromFirstStep(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._count_from_first_step()

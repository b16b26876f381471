"""A thin [`Trainer`]: ranks instead of logits in evaluation, batches of similar lengths, honest model cards."""

import logging
import shutil
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub import CommitInfo
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EvalPrediction, get_scheduler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, IntervalStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..data.collator import SequentialRecommendationCollator
from ..models.catalogue import CatalogueQuery
from ..results import CUTOFFS, RunResults, written_whole
from ..sharing.hub import publish
from ..sharing.model_card import render_model_card
from .arguments import METRIC_SCHEDULES, check_arguments
from .batches import LengthGroupedEpochSampler
from .metrics import ranking_metrics
from .progress import EvaluationLines, ProgressBar
from .resumable_trainer import ResumableTrainer
from .rows import check_columns, check_evaluation_rows, history_lengths, leave_out_short_histories
from .sharding import check_sharding, sharded_as_one


logger = logging.getLogger(__name__)

# What a model reads of an evaluation batch.
READ = ("input_ids", "attention_mask", "timestamps", "request_timestamps", "event_features")


class SequentialRecommendationTrainer(ResumableTrainer):
    """
    [`ResumableTrainer`] for sequential recommenders. It differs from it, and so from the stock [`Trainer`], in this:

    - Datasets have rows of `input_ids` (a user's whole history of token ids, oldest first) and, for evaluation, a
      `target` (the token id of the item to rank). Other columns are ignored. Training histories of fewer than 2 items
      are left out, with a warning.
    - Evaluation ranks each target in the full catalogue, chunk by chunk, and gathers ranks and the 20 best
      items, never logits. The metrics are those of [`ranking_metrics`], for example `eval_ndcg@10`; there is no
      `eval_loss`. `predict` returns `predictions = (ranks, top_ids)` in the order of the dataset: ranks of shape
      `(num_users, 2)` (seen items excluded, seen items kept) and top_ids of shape `(num_users, 20)`, -1 where nothing
      is left to recommend. Seen means the whole history, also what the model's window cuts off; whether top_ids are
      without these is the configuration's `exclude_seen`. No user is dropped, whatever `dataloader_drop_last` says.
    - A training prints one line per evaluation: its metrics are with seen items excluded or kept as `exclude_seen`
      says. `metric_for_best_model` is to be `"ndcg@10"` or, where they are kept, `"ndcg@10_seen_kept"`.
    - `train_sampling_strategy="group_by_length"` groups the histories of a step, on all devices, by the number of
      items that the model sees, and takes the steps in random order. `"batch_rebalance"` leaves the steps random and
      groups the histories within each, over its `gradient_accumulation_steps` and all devices.
    - `lr_scheduler_type="reduce_lr_on_plateau"` follows `metric_for_best_model` in its direction.
    - With FSDP2, embeddings and head are sharded with the whole model, and not in a group of their own.
    - Weight decay applies to the weights of linear layers and to embeddings, those of the items above all: not to
      norms, biases, interest experts and slots of the interest memory.
    - The model card states what was trained and measured, and nothing else.
    - `push_to_hub` publishes what [`publish`] does: the model with its code and its card, nothing pickled. A push that
      fails while the model is trained is logged, and training goes on.

    Args:
        data_collator ([`SequentialRecommendationCollator`], *optional*):
            Defaults to the objective of the model's configuration, and the tokenizer's `model_max_length`.
        kwargs: All other arguments of [`Trainer`]; `compute_metrics` defaults to [`ranking_metrics`].

    Raises:
        `ValueError`: without a `data_collator`, if `model` (or `model_init`) or `processing_class` is missing; if
            an argument cannot be honoured (see [`check_arguments`] and [`check_sharding`]); if no training history has
            two items; if an evaluation row has no history or no `target`.
    """

    def __init__(self, model=None, args=None, data_collator=None, **kwargs) -> None:
        train_dataset = kwargs["train_dataset"] = leave_out_short_histories(kwargs.get("train_dataset"))
        eval_dataset = kwargs.get("eval_dataset")
        if args is not None:
            check_arguments(args, train_dataset, eval_dataset, has_ranking_metrics="compute_metrics" not in kwargs)
            if args.eval_strategy != IntervalStrategy.NO:
                check_evaluation_rows(eval_dataset)
        tokenizer = kwargs.get("processing_class")
        has_model = model is not None or kwargs.get("model_init") is not None
        if data_collator is None and not (has_model and tokenizer is not None):
            raise ValueError("without a data_collator both model (or model_init) and processing_class must be given")
        kwargs.setdefault("compute_metrics", self._compute_ranking_metrics)
        super().__init__(model, args, data_collator, **kwargs)
        check_sharding(self.args, self.accelerator)
        config = self.model.config
        if tokenizer is not None and len(tokenizer) != config.vocab_size:
            raise ValueError(
                f"vocab_size of the model must be that of the tokenizer, {len(tokenizer)}, found {config.vocab_size}"
            )
        known = config.event_features if tokenizer is None else getattr(tokenizer, "event_features", {})
        if known != config.event_features:
            raise ValueError(
                f"event_features of the model must be those of the tokenizer, {known}, found {config.event_features}"
            )
        if data_collator is None:
            self.data_collator = SequentialRecommendationCollator(
                pad_token_id=config.pad_token_id,
                mask_token_id=config.mask_token_id,
                max_length=tokenizer.model_max_length,
                objective=config.training_objective,
                use_timestamps=config.use_timestamps,
                event_features=[*config.event_features],
            )
        if config.use_timestamps:
            setting = "use_timestamps=True"
            check_columns(train_dataset, "train_dataset", ["timestamps"], setting)
            check_columns(eval_dataset, "eval_dataset", ["timestamps", "target_timestamp"], setting)
        for dataset, field in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            check_columns(dataset, field, [*config.event_features], f"event_features={config.event_features}")
        self.callback_handler.callbacks.pop()  # the stock one, added last, prints all metrics of an evaluation
        if not self.args.disable_tqdm:
            self.add_callback(ProgressBar)
        self.add_callback(EvaluationLines)

    def _compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        ranks, top_ids = prediction.predictions
        return ranking_metrics(ranks, top_ids, self.model.config.vocab_size - self.model.config.num_special_tokens)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = {*self._signature_columns, "target", *self.model.config.event_features}
        if self.model.config.use_timestamps:
            columns.add("target_timestamp")
        else:
            columns.discard("timestamps")  # every forward has the argument
        self._signature_columns = sorted(columns)

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        by_length = ("group_by_length", "batch_rebalance")
        if args.train_sampling_strategy not in by_length or not isinstance(train_dataset, datasets.Dataset):
            return super()._get_train_sampler(train_dataset)
        num_inputs = np.minimum(history_lengths(train_dataset) - 1, self.data_collator.max_length).tolist()
        # Of all processes: none waits for another that has longer histories.
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.train_sampling_strategy == "group_by_length":
            return LengthGroupedEpochSampler(step_size, num_inputs, self._data_seed())
        return BatchRebalanceSampler(  # the stock one, with the seed of the run
            num_inputs,
            step_size,
            dp_size=args.world_size,
            grad_accum=args.gradient_accumulation_steps,
            seed=self._data_seed(),
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
        )

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> Sampler | None:
        # Always the order of the dataset: the stock sampler shuffles the predictions with group_by_length.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_dataloader(self, *positional, is_training: bool = False, **kwargs) -> DataLoader:
        # Only the training may drop its last batch: metrics are those of all users. PyTorch pins memory for an
        # accelerator other than MPS, and warns of each data loader that asks for it elsewhere.
        args = self.args
        drop_last, pin_memory = args.dataloader_drop_last, args.dataloader_pin_memory
        args.dataloader_drop_last = drop_last and is_training
        args.dataloader_pin_memory = pin_memory and args.device.type not in ("cpu", "mps")
        try:
            return super()._get_dataloader(*positional, is_training=is_training, **kwargs)
        finally:
            args.dataloader_drop_last, args.dataloader_pin_memory = drop_last, pin_memory

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type in METRIC_SCHEDULES:
            options = {
                "mode": "max" if self.args.greater_is_better else "min",
                **(self.args.lr_scheduler_kwargs or {}),
            }
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type, optimizer or self.optimizer, scheduler_specific_kwargs=options
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _issue_warnings_after_load(self, load_result) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _prepare_for_training(self, *args, **kwargs):
        # Accelerate takes a model that was evaluated before for one that is ready to be trained and would not wrap it
        # in DistributedDataParallel: every process would silently train a model of its own.
        if self.model_wrapped is self.model and not self.is_fsdp_enabled:
            self.model._is_accelerate_prepared = False
        with sharded_as_one(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            # Accelerate shards a model together with its optimizer: before there is one, each process has it whole.
            self.accelerator._models.append(self.model.to(self.args.device))
        return super().evaluation_loop(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)
        ]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """
        Returns no loss, `(ranks, top_ids)` of shapes `(batch_size, 2)` and `(batch_size, 20)`, and the target ids of
        shape `(batch_size,)`.
        """
        if "target_ids" not in inputs:
            raise ValueError("evaluation rows must have a target, found rows without one")
        inputs = self._prepare_inputs(inputs)
        query = CatalogueQuery(max(CUTOFFS), inputs["seen_ids"], target_ids=inputs["target_ids"])
        with torch.no_grad(), self.accelerator.autocast():
            outputs = model(
                **{name: inputs[name] for name in READ if name in inputs},
                query=query,
                return_dict=True,
            )
        return None, (outputs.ranks, outputs.token_ids), inputs["target_ids"]

    def end(self) -> None:
        # A wrapped model that outlives the process group keeps its threads alive, and these abort the process when
        # they meet an interpreter that is shutting down (pytorch/pytorch#179291).
        self.model_wrapped = self.callback_handler.model = self.model
        self.accelerator.free_memory()
        super().end()

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | None = None,
    ) -> None:
        """
        Writes `README.md` into `args.output_dir`, as [`~model_card.render_model_card`] renders it: from the folder's
        `all_results.json` where there is one, and else from what was trained and the metrics of the last evaluation
        (with `load_best_model_at_end`, those of the best checkpoint). What is unknown is left out.

        Args:
            language (`str`, *optional*): Language of the items' titles.
            license (`str`, *optional*): License of the weights.
            tags (`str` or `list[str]`, *optional*): Tags beside those of every card.
            model_name (`str`, *optional*): Title of the card; defaults to the last part of the repository's name.
            finetuned_from (`str`, *optional*): The Hub id of the model that this one was trained on from.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the training data.
            dataset (`str`, *optional*): Name of the training data, as it is to be read.
        """
        if not self.is_world_process_zero():
            return
        card = render_model_card(
            self.args.output_dir,
            self.hub_model_id or self.args.hub_model_id or self.args.output_dir,
            self._known_for_card(dataset),
            has_code=self.hub_model_id is not None and self.model.config.model_type == "elastic",
            model_name=model_name,
            license=license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags,
            base_model=finetuned_from,
            datasets=dataset_tags,
        )
        with written_whole(Path(self.args.output_dir, "README.md")) as file:
            file.write(str(card).encode())

    def training_settings(self) -> dict:
        """The settings of the training that results and model cards name; a batch is that of all processes."""
        args = self.args
        return {
            "epochs": args.num_train_epochs,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "schedule": str(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "weight_decay": args.weight_decay,
            "bf16": args.bf16,
            "metric_for_best_model": args.metric_for_best_model,
        }

    def best_epoch(self) -> float | None:
        """The epoch of the best checkpoint, if that is the one which training ends with."""
        if not self.args.load_best_model_at_end:
            return None
        epochs = [log["epoch"] for log in self.state.log_history if log["step"] == self.state.best_global_step]
        return epochs[0] if epochs else None

    def _known_for_card(self, dataset: str | None) -> RunResults:
        """What all_results.json would say, as far as the trainer knows."""
        config = self.model.config
        return RunResults(
            model_type=config.model_type,
            seed=self.args.seed,
            dataset=dataset,
            num_items=config.vocab_size - config.num_special_tokens,
            num_parameters=self.model.num_parameters(),
            max_length=self.data_collator.max_length,
            config=config.to_dict() | {"mask_seen_in_loss": config.masks_seen},
            training=self.training_settings(),
            epochs=self.state.epoch or None,
            best_epoch=self.best_epoch(),
            metrics=self._metrics_for_card(),
            transformers_version=transformers.__version__,
            torch_version=torch.__version__,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Saves the model, writes its card and publishes both, as [`publish`] does.

        Args:
            commit_message (`str`): First line of the commit's message.
            blocking (`bool`): Wait for the upload; otherwise its `Future` is returned.
            token (`str`, *optional*): Defaults to `args.hub_token`.
            revision (`str`, *optional*): Branch to commit to. Defaults to `args.hub_revision`, then to `"main"`.
            private (`bool`, *optional*): Whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs: Arguments of [`create_model_card`].

        Returns:
            What [`publish`] returns; `None` on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        self._finish_current_push()
        push = partial(self._publish, self.args.output_dir, commit_message, token, revision)
        return push() if blocking else hf_api().run_as_future(push)

    def _push_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock one pushes pickles, and a configuration without the code that it names.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        shutil.copy(Path(self.args.output_dir, "README.md"), checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        job = hf_api().run_as_future(self._try_to_publish, checkpoint_folder, message)
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _publish(
        self, folder: str, commit_message: str, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        return publish(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token or self.args.hub_token,
        )

    def _try_to_publish(self, folder: str, commit_message: str) -> None:
        try:
            self._publish(folder, commit_message)
        except Exception as error:
            logger.warning(f"push_to_hub: {error}")

    def _metrics_for_card(self) -> dict[str, float]:
        logs = [log for log in self.state.log_history if "eval_ndcg@10" in log and "eval_coverage@10" in log]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            logs = [log for log in logs if log["step"] == self.state.best_global_step]
        return {key: value for key, value in logs[-1].items() if "@" in key} if logs else {}

"""What a training prints: a bar, and one line per evaluation."""

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..results import SUFFIXES


NO_METRICS = ("epoch", "_runtime", "_per_second")


class ProgressBar(ProgressCallback):
    """A [`ProgressCallback`] that leaves the metrics to [`EvaluationLines`]."""

    def on_log(self, args, state, control, **kwargs) -> None:
        pass


class EvaluationLines(TrainerCallback):
    """Print one line per evaluation while training, such as `epoch 3/16  loss 2.457  NDCG@10 0.1418 (best)`.

    It has the mean training loss since the last line, the metric that the best checkpoint is chosen by, NDCG@10 and
    HR@10, with seen items excluded or kept as the model recommends. Where nothing is evaluated, it has the loss alone.
    """

    def __init__(self) -> None:
        self.loss: str | None = None
        self.is_training = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.is_training = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.is_training = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        if "loss" in (logs or {}):
            self.loss = f"loss {logs['loss']:.4g}"
            if not control.should_evaluate:
                self._print_line(args, state, [])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, model, **kwargs
    ) -> None:
        if self.is_training:
            suffix = SUFFIXES[model.config.exclude_seen]
            self._print_line(args, state, _describe(metrics, args, state, suffix))

    def _print_line(self, args: TrainingArguments, state: TrainerState, figures: list[str]) -> None:
        if args.max_steps > 0:
            progress = f"step {state.global_step}/{state.max_steps}"
        else:
            progress = f"epoch {round(state.epoch or 0, 2):g}/{args.num_train_epochs:g}"
        if state.is_world_process_zero:
            tqdm.write("  ".join([progress, *([self.loss] if self.loss else []), *figures]))
        self.loss = None


def _describe(metrics: dict[str, float], args: TrainingArguments, state: TrainerState, suffix: str) -> list[str]:
    best_key = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
    shown = {key: value for key, value in metrics.items() if key.endswith((f"_ndcg@10{suffix}", f"_hr@10{suffix}"))}
    if best_key in metrics:
        shown = {best_key: metrics[best_key], **shown}
    # Metrics of the user's own
    shown = shown or {key: value for key, value in metrics.items() if not key.endswith(NO_METRICS)}
    figures = []
    for key, value in shown.items():
        is_best = key == best_key and (
            state.best_metric is None
            or (value > state.best_metric if args.greater_is_better else value < state.best_metric)
        )
        name = key.removeprefix("eval_").replace("_", " ")
        for acronym in ("ndcg", "hr", "mrr"):
            name = name.replace(f"{acronym}@", f"{acronym.upper()}@")
        figures.append(f"{name} {value:.4f}" + (" (best)" if is_best else ""))
    return figures

"""The held-out samples of a run: answered during training, on the weights that sampling uses."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from tqdm import tqdm

from data.loader import PromptDataset
from data.sample import InputError
from grpo.config import Config
from grpo.evaluate.answer import AnswerOptions, answer, answers_of, truths_of
from grpo.evaluate.metrics import figures
from grpo.evaluate.pictures import pictures
from grpo.ranks import broadcast_object, print_rank0, raise_together
from grpo.run.scoring import Scorer
from grpo.run.tracking import Tracker
from reward.extract import extract_number


@dataclass
class Evaluation:
    """What an evaluation found."""

    figures: dict[str, float | None]
    draw: Callable[[], dict[str, bytes]]  # makes the pictures (PNG); only rank 0 needs them
    seconds: float


class HeldOut:
    """Held-out samples, and how they are answered: greedily."""

    def __init__(self, dataset: PromptDataset, scorer: Scorer, config: Config):
        """Decode nothing yet, but score the best constant answer. Collective; raises InputError."""
        self.config, self.dataset, self.options = config, dataset, AnswerOptions(config, scorer)
        known = raise_together(lambda: [one for one in dataset.samples if extract_number(one.answer) is not None])
        self.ids, self.truths = [sample.id for sample in known], raise_together(truths_of, known, self.options)

    def evaluate_policy(
        self, model, step: int, tracker: Tracker, save: Callable[..., bool], is_stopped: Callable[[], bool]
    ) -> None:
        """Evaluate the policy after a step, show the figures, and save it as best/ if none was better. Collective.

        model: its unsharded copy; save: takes the folder's name, the step, and whether it is needed.
        """
        try:
            evaluation = self.evaluate(model, is_stopped)
        except InputError:  # such as a broken video: what was trained so far is not lost
            if step > tracker.start_step:
                save(f"checkpoint-{step}", step)
            raise
        if evaluation and tracker.show_evaluation(step, evaluation):
            before, tracker.best_step = tracker.best_step, step
            if not save("best", step, is_needed=False):
                tracker.best_step = before

    def evaluate(self, model, is_stopped: Callable[[], bool]) -> Evaluation | None:
        """Answer all samples; None if a signal stops the run meanwhile. Collective; raises InputError.

        model: unsharded. is_stopped: asked after each round of batches; collective.
        """
        began, config, done = time.perf_counter(), self.config, {}
        is_hidden = None if dist.get_rank() == 0 else True  # None: hidden unless on a terminal
        with tqdm(total=len(self.dataset.samples), desc="evaluating", leave=False, disable=is_hidden) as bar:
            for predictions, bad_media in answer(model, self.dataset, self.options):
                if is_stopped():
                    return None
                done |= {prediction.id: prediction for prediction in predictions}
                print_rank0(*(f"left out of the evaluation: {line}" for line in bad_media))
                bar.update(len(predictions))
        answered = [i for i, sample_id in enumerate(self.ids) if sample_id in done]
        if not answered:
            raise InputError(f"--eval_data_path {' '.join(config.eval_data_path)!r}: no sample has readable videos")
        truths = self.truths.subset(answered)
        answers = answers_of([done[self.ids[i]] for i in answered])
        # Of rank 0, since all ranks must agree on which model is the best, to the last digit.
        found = broadcast_object(figures(truths, answers, config.valid_range, config.cuts))
        draw = partial(pictures, truths.numbers, answers, found, config.valid_range, config.cuts, "held-out")
        return Evaluation({name: figure["value"] for name, figure in found.items()}, draw, time.perf_counter() - began)

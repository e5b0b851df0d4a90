"""The held-out samples of a run: answered during training, on the weights that sampling uses."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from data.loader import PromptDataset
from data.sample import InputError
from grpo.config import Config
from grpo.evaluate.answer import answer, answers_of
from grpo.evaluate.metrics import figures
from grpo.evaluate.pictures import pictures
from grpo.ranks import broadcast_object, raise_together
from grpo.run.scoring import Scorer
from grpo.run.tracking import Tracker
from reward.extract import extract_number
from reward.zero_skill import constant_rewards


class HeldOut:
    """Held-out samples, and how they are answered: greedily."""

    def __init__(self, dataset: PromptDataset, scorer: Scorer, config: Config):
        """Decode nothing yet, but score the best constant answer. Collective; raises InputError."""
        self.dataset, self.scorer, self.config = dataset, scorer, config
        known = raise_together(lambda: [one for one in dataset.samples if extract_number(one.answer) is not None])
        truths, self.ids = np.array([extract_number(one.answer) for one in known]), [one.id for one in known]
        self.constant_rewards = raise_together(constant_rewards, scorer.functions, known, truths, scorer.keys)  # (K, n)

    def evaluate_policy(
        self, model, step: int, tracker: Tracker, save: Callable[..., bool], is_stopped: Callable[[], bool]
    ) -> None:
        """Evaluate the policy after a step, show the figures, and save it as best/ if none was better. Collective.

        model: its unsharded copy; save: takes the folder's name, the step, and whether it is needed; is_stopped: asked
        after each round of batches, says whether a signal stops the run. Raises InputError.
        """
        began, config, done = time.perf_counter(), self.config, {}
        is_hidden = None if dist.get_rank() == 0 else True  # None: hidden unless on a terminal
        try:
            with tqdm(total=len(self.dataset.samples), desc="evaluating", leave=False, disable=is_hidden) as bar:
                for predictions in answer(model, self.dataset, self.scorer, config):
                    if is_stopped():
                        return
                    done |= {prediction.id: prediction for prediction in predictions}
                    bar.update(len(predictions))
            answered = [i for i, sample_id in enumerate(self.ids) if sample_id in done]
            if not answered:
                raise InputError(f"--eval_data_path {' '.join(config.eval_data_path)!r}: no sample has readable videos")
        except InputError:  # such as a broken video: what was trained so far is not lost
            if step > tracker.start_step:
                save(f"checkpoint-{step}", step)
            raise
        predictions = [done[self.ids[i]] for i in answered]
        answers = answers_of(predictions, self.constant_rewards[:, answered], config.valid_range)
        # Of rank 0, since all ranks must agree on which model is the best, to the last digit.
        found = broadcast_object(figures(answers, config.cuts))
        draw = partial(pictures, answers, found, config.cuts, "held-out")
        if tracker.show_evaluation(step, found, draw, time.perf_counter() - began):
            before, tracker.best_step = tracker.best_step, step
            if not save("best", step, is_needed=False):
                tracker.best_step = before

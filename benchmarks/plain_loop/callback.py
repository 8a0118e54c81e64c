"""The callback that gives turns."""

import json
import time

import torch

from sat_train.encoding.encoded_batch import CLIP
from sat_train.extend import Callback
from sat_train.models.build import build_dit

from . import sat_trainer

FILE = "plain_loop.jsonl"


class PlainLoop(Callback):
    """Writes a line a round: seconds of a step of training and of the other loops, by two clocks.

    The second one is that of this process: what other programs and the loader's worker take is left out.
    """

    def __init__(self, params, context):
        self.params, self.context = params, context
        self.batch, self.since = None, None

    def loss_computed(self, output, batch):
        self.batch = batch

    def step_done(self, trainer):
        if trainer.state.step % self.params.steps:
            return
        if self.since is not None:  # the first round is warm-up
            line = {"ours": self.each_since(self.since), "plain": self.time(self.plain_step(trainer))}
            if self.params.sat:
                line["sat"] = self.time(self.sat_step(trainer))
            with (self.context.folder() / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.since = now()

    def each_since(self, start):
        return [(end - begin) / self.params.steps for begin, end in zip(start, now(), strict=True)]

    def time(self, step):
        """Returns the seconds of a step by the two clocks."""
        for _ in range(3):
            step()
        start = now()
        for _ in range(self.params.steps):
            step()
        return self.each_since(start)

    def plain_step(self, trainer):
        """Returns a step of the plain loop: forward, backward, clip, AdamW."""
        dit, compute_loss = self.model_and_loss(trainer)
        optimizer = self.adamw(dit.parameters())
        max_norm = self.context.config.deepspeed.gradient_clipping

        def step():
            compute_loss(dit).backward()
            torch.nn.utils.clip_grad_norm_(dit.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def sat_step(self, trainer):
        """Returns a step of SAT's trainer."""
        dit, compute_loss = self.model_and_loss(trainer)
        max_norm = self.context.config.deepspeed.gradient_clipping
        return sat_trainer.step(dit, compute_loss, self.adamw, max_norm=max_norm)

    def model_and_loss(self, trainer):
        """Returns a copy of the model that is trained, and a loss on one batch of its encodings."""
        config, own = self.context.config, trainer.engine.module
        dit = build_dit(config.spec, device=own.device, dtype=own.dtype)
        dit.load_state_dict(own.state_dict())
        latent, text = self.batch.encodings[CLIP]["mean"].float(), self.batch.encodings["text"]["text"]
        timesteps, text = torch.full((len(latent),), 500), text.float()
        target = torch.randn_like(latent)
        return dit, lambda model: (model(latent, timesteps, text) - target).square().mean()

    def adamw(self, parameters):
        params = self.context.config.deepspeed.optimizer.params
        return torch.optim.AdamW(
            parameters, lr=params.lr, betas=params.betas, eps=params.eps, fused=self.params.fused or None
        )


def now():
    return time.perf_counter(), time.process_time()

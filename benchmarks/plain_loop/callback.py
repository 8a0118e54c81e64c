"""The callback that takes turns."""

import json
import time

import torch

from sat_train.encoding.encoded_batch import CLIP
from sat_train.extend import Callback
from sat_train.models.build import build_dit

FILE = "plain_loop.jsonl"


class PlainLoop(Callback):
    """Writes a line a round: seconds a step of training, and of the plain loop."""

    def __init__(self, params, context):
        self.params, self.context = params, context
        self.batch, self.since = None, 0.0

    def loss_computed(self, output, batch):
        self.batch = batch

    def step_done(self, trainer):
        if trainer.state.step % self.params.steps:
            return
        ours = (time.perf_counter() - self.since) / self.params.steps
        if self.since:  # the first round is warm-up
            line = {"ours": ours, "plain": self.plain(trainer) / self.params.steps}
            with (self.context.folder() / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.since = time.perf_counter()

    def plain(self, trainer):
        """Returns the seconds of a round of the plain loop: forward, backward, clip, AdamW."""
        config, own = self.context.config, trainer.engine.module
        dit = build_dit(config.spec, device=own.device, dtype=own.dtype)
        dit.load_state_dict(own.state_dict())
        settings = config.deepspeed.optimizer.params
        optimizer = torch.optim.AdamW(
            dit.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=self.params.fused or None,
        )
        latent, text = self.batch.encodings[CLIP]["mean"].float(), self.batch.encodings["text"]["text"]
        timesteps, text = torch.full((len(latent),), 500), text.float()
        target = torch.randn_like(latent)

        def step():
            loss = (dit(latent, timesteps, text) - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(dit.parameters(), config.deepspeed.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        start = time.perf_counter()
        for _ in range(self.params.steps):
            step()
        return time.perf_counter() - start

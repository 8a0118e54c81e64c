"""The callback that takes turns."""

import json
import time

import torch

from sat_train.encoding.encoded_batch import CLIP
from sat_train.extend import Callback
from sat_train.models.build import build_dit

FILE = "plain_loop.jsonl"


class PlainLoop(Callback):
    """Writes a line a round: seconds of a step of training and of the plain loop, by two clocks.

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
            line = {"ours": self.each_since(self.since), "plain": self.plain(trainer)}
            with (self.context.folder() / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.since = now()

    def each_since(self, start):
        return [(end - begin) / self.params.steps for begin, end in zip(start, now(), strict=True)]

    def plain(self, trainer):
        """Returns the seconds of a step of the plain loop: forward, backward, clip, AdamW."""
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
        start = now()
        for _ in range(self.params.steps):
            step()
        return self.each_since(start)


def now():
    return time.perf_counter(), time.process_time()

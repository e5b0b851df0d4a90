"""The baseline of `python -m grpo.benchmark`: every completion is a row with its own copy of the prompt and its videos.

That is the plain way, in which nothing is shared. Some trainers share a prefix of text in the update (PrefixGrouper,
arXiv:2506.05433; verl; Unsloth); we know of none that shares videos and their gradients, in rollout and update.
Nothing in training calls this. Both functions take Hugging Face's own model, without our layers, but with our positions
(`data/prompt.py`), since those of transformers 5.3 and later are wrong.

| G | completions of the prompt | C | tokens of each completion | P | prompt tokens | V | vocabulary |
"""

import torch
from torch import Tensor

from data.loader import Prompt
from data.media.patches import normalise
from grpo.loss import clipped_loss


def repeated_rollout(model, prompt: Prompt, G: int, C: int, suppress_tokens: Tensor) -> Tensor:
    """Sample G rows of C tokens each by Hugging Face's `generate`; return their ids, (G, C)."""
    ids = prompt.prompt_ids.expand(G, -1)  # (G, P)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=prompt.position_ids[:, None].expand(-1, G, -1),  # (3, G, P)
        pixel_values_videos=normalise(prompt.patches).repeat(G, 1),
        video_grid_thw=prompt.grid_thw.repeat(G, 1),
        min_new_tokens=C,
        max_new_tokens=C,
        do_sample=True,
        top_k=0,
        suppress_tokens=suppress_tokens.tolist(),
    )[:, ids.shape[1] :]


def repeated_update(model, optimizer, prompt: Prompt, ids: Tensor, advantages: Tensor, suppress_tokens: Tensor) -> None:
    """Do an update of the policy on G rows `[prompt | completion]`; ids: (G, C), advantages: (G,)."""
    G, C = ids.shape
    positions = torch.cat([prompt.position_ids, prompt.completion_positions(C)], dim=1)  # (3, P + C)
    optimizer.zero_grad()
    logits = model(
        input_ids=torch.cat([prompt.prompt_ids.expand(G, -1), ids], dim=1),
        position_ids=positions[:, None].expand(-1, G, -1),
        pixel_values_videos=normalise(prompt.patches).repeat(G, 1),
        video_grid_thw=prompt.grid_thw.repeat(G, 1),
        logits_to_keep=C + 1,
        use_cache=False,
    ).logits[:, :-1]  # (G, C, V)
    logprobs = torch.log_softmax(logits.float().index_fill(2, suppress_tokens, -torch.inf), dim=2)
    logprobs = logprobs.gather(2, ids[:, :, None])[:, :, 0]
    loss = clipped_loss((logprobs - logprobs.detach()).exp(), advantages, 0.05, 0.1)
    loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

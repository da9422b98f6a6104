"""The formula of attention within segments, written out."""

import itertools

import torch


def naive(query, key, value, borders, scaling=None, window=None, softcap=None, sinks=None, prefix=None):
    """`segment_attention` by one dense matrix of scores for each segment."""
    outputs = []
    group = query.shape[1] // key.shape[1]
    before = 0 if prefix is None else prefix[0].shape[2]
    for start, end in itertools.pairwise(borders):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        if prefix is not None:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] + before - torch.arange(end - start + before)
        hidden = (distance < 0) | (distance >= (window or len(distance) + before))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, end - start, 1)], dim=-1)
        outputs.append(torch.softmax(scores, -1)[..., : v.shape[2]] @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)

"""A classifier over tokens: PyTorch's two-layer bidirectional LSTM, single LSTMs in the port."""

import mlx.core as mx
import mlx.nn as nn
import torch
from torch import nn as tnn

WORDS, DIM, HIDDEN, CLASSES = 11, 5, 6, 4


class Classifier(tnn.Module):
    """Tokens (B, T) to a dict of logits (B, classes) and the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = tnn.Embedding(WORDS, DIM)
        self.lstm = tnn.LSTM(DIM, HIDDEN, 2, batch_first=True, bidirectional=True)
        self.classifier = tnn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        states, _ = self.lstm(self.embedding(tokens))
        pooled = states.mean(1)
        return {"logits": self.classifier(pooled), "pooled": pooled}


class ClassifierPort(nn.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.wte = nn.Embedding(WORDS, DIM)
        sizes = (DIM, DIM, 2 * HIDDEN, 2 * HIDDEN)
        self.rnns = [nn.LSTM(n, HIDDEN) for n in sizes]
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def __call__(self, tokens: mx.array) -> dict[str, mx.array]:
        x = self.wte(tokens)
        for i in (0, 2):
            forward, _ = self.rnns[i](x)
            backward, _ = self.rnns[i + 1](x[:, ::-1])
            if self.fault != "order" or i == 2:
                backward = backward[:, ::-1]
            x = mx.concatenate([forward, backward], axis=-1)
        pooled = x[:, -1] if self.fault == "last" else x.mean(1)
        return {"logits": self.head(pooled), "pooled": pooled}

"""Recurrent networks, and what is written around them by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.corpus.case import Case, Net, rows, tokens


def own_state() -> Net:
    def forward(self, x):
        start = torch.zeros(1, len(x), 6)
        found, _ = self.rnn(self.embed(x), (start, start))
        return self.head(found[:, -1])

    return Net(
        forward, embed=nn.Linear(5, 7), rnn=nn.LSTM(7, 6, batch_first=True), head=nn.Linear(6, 3)
    )


def cell() -> Net:
    def forward(self, x):
        h, c = torch.zeros(len(x), 6), torch.zeros(len(x), 6)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)

    return Net(forward, cell=nn.LSTMCell(5, 6), head=nn.Linear(6, 3))


def gru_cell() -> Net:
    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)

    return Net(forward, cell=nn.GRUCell(5, 6), head=nn.Linear(6, 3))


def bidirectional() -> Net:
    def forward(self, x):
        _, h = self.rnn(x)
        return self.head(torch.cat([h[-2], h[-1]], 1))

    return Net(
        forward, rnn=nn.GRU(5, 6, batch_first=True, bidirectional=True), head=nn.Linear(12, 3)
    )


def packed() -> Net:
    def forward(self, ids, lengths):
        x = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        found, _ = pad_packed_sequence(self.rnn(x)[0], batch_first=True)
        return self.head(found.sum(1))

    return Net(
        forward,
        embed=nn.Embedding(11, 5),
        rnn=nn.LSTM(5, 6, batch_first=True),
        head=nn.Linear(6, 3),
    )


def two_layers() -> Net:
    return Net(
        lambda s, x: s.head(s.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(5, 6, 2, batch_first=True, dropout=0.5),
        head=nn.Linear(6, 3),
    )


def projected() -> Net:
    return Net(
        lambda s, x: s.head(s.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(5, 6, batch_first=True, proj_size=4),
        head=nn.Linear(4, 3),
    )


def written_by_hand() -> Net:
    def forward(self, x):
        h = torch.zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = torch.tanh(self.read(torch.cat([x[:, t], h], 1)))
        return self.head(h)

    return Net(forward, read=nn.Linear(11, 6), head=nn.Linear(6, 3))


def sequence_to_sequence() -> Net:
    def forward(self, ids):
        states, last = self.encoder(self.embed(ids))
        found, _ = self.decoder(self.embed(ids.flip(1)), last)
        scores = (found @ states.transpose(1, 2)).softmax(-1)
        return self.head(torch.cat([found, scores @ states], -1))

    return Net(
        forward,
        embed=nn.Embedding(11, 5),
        encoder=nn.GRU(5, 6, batch_first=True),
        decoder=nn.GRU(5, 6, batch_first=True),
        head=nn.Linear(12, 11),
    )


RECURRENT = [
    Case("LSTM with its own zero state", own_state, rows(4, 5), 13),
    Case("LSTMCell over four steps", cell, rows(4, 5), 6),
    Case("GRUCell", gru_cell, rows(4, 5), 6),
    Case("bidirectional GRU", bidirectional, rows(4, 5), 12),
    Case("packed sequence", packed, lambda: (torch.randint(11, (2, 4)), torch.tensor([4, 2])), 11),
    Case("LSTM of two layers", two_layers, rows(4, 5), 12),
    Case("LSTM with a projection", projected, rows(4, 5), 10),
    Case(
        "plain RNN",
        lambda: Net(
            lambda s, x: s.head(s.rnn(x)[0][:, -1]),
            rnn=nn.RNN(5, 6, batch_first=True),
            head=nn.Linear(6, 3),
        ),
        rows(4, 5),
        6,
    ),
    Case("recurrence written by hand", written_by_hand, rows(4, 5), 6),
    Case("sequence to sequence with attention", sequence_to_sequence, tokens(), 11),
]

"""Convolutional networks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.corpus.case import Case, Net, rows


def unflatten_decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 4 * 9), nn.ReLU(), nn.Unflatten(1, (4, 3, 3)), nn.ConvTranspose2d(4, 2, 2)
    )


def text_cnn() -> Net:
    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        found = [torch.relu(conv(x)).amax(-1) for conv in self.convs]
        return self.head(torch.cat(found, 1))

    convs = nn.ModuleList(nn.Conv1d(6, 4, k) for k in (2, 3))
    return Net(forward, embed=nn.Embedding(11, 6), convs=convs, head=nn.Linear(8, 3))


def c2f() -> Net:
    """A stage of YOLO: split, two blocks, everything concatenated."""

    def forward(self, x):
        found = list(F.silu(self.first(x)).chunk(2, 1))
        for block in self.blocks:
            found.append(found[-1] + F.silu(block(found[-1])))
        return self.last(torch.cat(found, 1)).mean((2, 3))

    blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
    return Net(forward, first=nn.Conv2d(3, 8, 1), blocks=blocks, last=nn.Conv2d(16, 3, 1))


def sppf() -> Net:
    def forward(self, x):
        x = torch.relu(self.first(x))
        pools = [x]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 3, 1, 1))
        return self.last(torch.cat(pools, 1)).mean((2, 3))

    return Net(forward, first=nn.Conv2d(3, 5, 1), last=nn.Conv2d(20, 3, 1))


def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(2, 1, 3, padding=1),
    )


def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 1)
    )


def res2net() -> Net:
    def forward(self, x):
        parts = torch.relu(self.first(x)).chunk(4, 1)
        found = [parts[0]]
        for part, conv in zip(parts[1:], self.convs, strict=True):
            found.append(torch.relu(conv(part + found[-1] if len(found) > 1 else part)))
        return self.last(torch.cat(found, 1)).mean((2, 3))

    convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
    return Net(forward, first=nn.Conv2d(3, 8, 1), convs=convs, last=nn.Conv2d(8, 3, 1))


def csp() -> Net:
    def forward(self, x):
        x = torch.relu(self.first(x))
        one, other = x[:, :4], x[:, 4:]
        return self.last(torch.cat([one, torch.relu(self.block(other))], 1)).mean((2, 3))

    return Net(
        forward,
        first=nn.Conv2d(3, 8, 1),
        block=nn.Conv2d(4, 4, 3, padding=1),
        last=nn.Conv2d(8, 3, 1),
    )


def spatial_transformer() -> Net:
    def forward(self, x):
        theta = self.locate(torch.relu(self.conv(x)).flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))

    return Net(forward, conv=nn.Conv2d(1, 4, 3), locate=nn.Linear(16, 6), head=nn.Linear(16, 3))


def unet(norm: type[nn.Module] = nn.BatchNorm2d) -> Net:
    def forward(self, x):
        fine = F.leaky_relu_(self.n1(self.down(x)))
        coarse = F.leaky_relu_(self.n2(self.bottom(fine)))
        up = self.up(coarse)
        return self.head(torch.cat([fine, up], 1))

    affine = {"affine": True} if norm is nn.InstanceNorm2d else {}
    return Net(
        forward,
        down=nn.Conv2d(1, 4, 3, padding=1),
        n1=norm(4, **affine),
        bottom=nn.Conv2d(4, 6, 3, stride=2, padding=1),
        n2=norm(6, **affine),
        up=nn.ConvTranspose2d(6, 5, 2, stride=2),
        head=nn.Conv2d(9, 2, 1),
    )


def instance_normed_before_concatenation() -> Net:
    def forward(self, x):
        return self.head(torch.cat([self.act(self.a(x)), self.b(x)], 1))

    return Net(
        forward, a=nn.Conv2d(1, 4, 1), act=nn.PReLU(), b=nn.Conv2d(1, 3, 1), head=nn.Conv2d(7, 2, 1)
    )


def separable(multiplier: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6 * multiplier, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(6 * multiplier, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def transposed_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )


def channels_last_norm() -> Net:
    def forward(self, x):
        x = self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.b(torch.relu(x)).mean((2, 3))

    return Net(forward, a=nn.Conv2d(3, 6, 3), norm=nn.LayerNorm(6), b=nn.Conv2d(6, 3, 1))


def norm_over_space() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 4, 4]), nn.ReLU(), nn.Conv2d(6, 2, 1))


def feature_pyramid() -> Net:
    def forward(self, x):
        fine = torch.relu(self.c1(x))
        coarse = torch.relu(self.c2(fine))
        top = self.l2(coarse)
        joined = self.l1(fine) + F.interpolate(top, scale_factor=2.0)
        return {"fine": self.head(joined), "coarse": self.head(top)}

    return Net(
        forward,
        c1=nn.Conv2d(3, 4, 3, padding=1),
        c2=nn.Conv2d(4, 6, 3, 2, 1),
        l1=nn.Conv2d(4, 5, 1),
        l2=nn.Conv2d(6, 5, 1),
        head=nn.Conv2d(5, 2, 1),
    )


CONVOLUTIONS = [
    Case("decoder that unflattens", unflatten_decoder, rows(6), 4),
    Case("TextCNN", text_cnn, lambda: torch.randint(11, (2, 7)), 14),
    Case("C2f of YOLO", c2f, rows(3, 6, 6), 8),
    Case("SPPF of YOLO", sppf, rows(3, 6, 6), 5),
    Case("PixelShuffle", pixel_shuffle, rows(1, 6, 6), 8),
    Case("PixelUnshuffle", pixel_unshuffle, rows(1, 6, 6), 3),
    Case("Res2Net", res2net, rows(3, 6, 6), 8),
    Case("CSPNet", csp, rows(3, 6, 6), 8),
    Case("spatial transformer", spatial_transformer, rows(1, 4, 4), 4, "affine_grid"),
    Case("U-Net", unet, rows(1, 8, 8), 15),
    Case("U-Net with InstanceNorm", lambda: unet(nn.InstanceNorm2d), rows(1, 8, 8), 15),
    Case("PReLU before a concatenation", instance_normed_before_concatenation, rows(1, 6, 6), 7),
    Case("depthwise convolution", lambda: separable(1), rows(3, 6, 6), 6),
    Case("depthwise convolution, twice the channels", lambda: separable(2), rows(3, 6, 6), 6),
    Case(
        "convolution in groups",
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        ),
        rows(3, 6, 6),
        4,
    ),
    Case("transposed convolution in groups", transposed_groups, rows(3, 6, 6), 2),
    Case("LayerNorm behind a permutation", channels_last_norm, rows(3, 6, 6), 6),
    Case("LayerNorm over space as well", norm_over_space, rows(3, 6, 6), 0),
    Case(
        "local response norm",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 2, 1)),
        rows(3, 6, 6),
        0,
        "pooled|resampled|windows",
    ),
    Case("feature pyramid", feature_pyramid, rows(3, 8, 8), 15),
    Case(
        "Conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 2),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        rows(1, 5, 5, 5),
        4,
    ),
    Case(
        "Conv1d and its flatten",
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        rows(2, 8),
        4,
    ),
    Case(
        "CircularPad",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        ),
        rows(2, 6, 6),
        4,
    ),
    Case(
        "upsampling",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 3)
        ),
        rows(2, 6, 6),
        4,
    ),
    Case(
        "unfold",
        lambda: Net(
            lambda s, x: s.b(F.unfold(torch.relu(s.a(x)), 2).mean(-1)),
            a=nn.Conv2d(2, 4, 3),
            b=nn.Linear(16, 3),
        ),
        rows(2, 6, 6),
        4,
    ),
    Case(
        "one image channel",
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        rows(1, 6, 6),
        4,
    ),
    Case(
        "GroupNorm",
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ),
        rows(3, 6, 6),
        8,
    ),
    Case(
        "frozen BatchNorm",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
        rows(3, 6, 6),
        4,
    ),
]

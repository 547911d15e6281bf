"""The heads of Report A as the report prints them (figures 6 to 8): upsample every map, then work at full size.

Widths and the number of stages are free; names of parameters are the report's. Slow on purpose: this is what the library is compared with."""
import torch
from torch import nn
from torch.nn import functional as F


class SEModule(nn.Module):
    "The report calls it without printing it: pool, two linear layers without biases, sigmoid, scale."
    def __init__(self, c, reduction=16):
        super().__init__()
        self.avg_pool, h = nn.AdaptiveAvgPool2d(1), max(8, c//reduction)
        self.fc = nn.Sequential(nn.Linear(c, h, bias=False), nn.ReLU(inplace=True), nn.Linear(h, c, bias=False), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x*y.expand_as(x)


class GatedFusion(nn.Module):
    "Figure 7, for any number of branches."
    def __init__(self, c, n):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.mlp = nn.Sequential(nn.Linear(c*n, c//2, bias=False), nn.ReLU(inplace=True), nn.Linear(c//2, n, bias=False), nn.Sigmoid())

    def forward(self, *xs):
        b, c, _, _ = xs[0].shape
        alpha = self.mlp(torch.cat([self.avg_pool(x).view(b, c) for x in xs], dim=1))
        out = 0
        for i, x in enumerate(xs): out = out + alpha[:, i].view(b, 1, 1, 1)*x
        return out


def classifier(c, n_out, drop=.25):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(c, n_out))


def upsample(xs):
    size = xs[0].shape[2:]
    return [xs[0]] + [F.interpolate(x, size=size, mode='bilinear', align_corners=False) for x in xs[1:]]


class LiteralPyramid(nn.Module):
    "Figure 6 without its backbone."
    def __init__(self, channels, n_out, drop=.25):
        super().__init__()
        self.fuse_conv = nn.Conv2d(sum(channels), channels[-1], kernel_size=1, bias=False)
        self.se = SEModule(channels[-1])
        self.classifier = classifier(channels[-1], n_out, drop)

    def forward(self, xs):
        return self.classifier(self.se(self.fuse_conv(torch.cat(upsample(xs), dim=1))))


class LiteralGated(nn.Module):
    "Figure 8 without its backbone; `conv2_1x1` belongs to layer 2, the shallowest of three."
    def __init__(self, channels, n_out, drop=.25):
        super().__init__()
        w = channels[-2]
        self.layers = range(5 - len(channels), 5)
        for i, c in zip(self.layers, channels): setattr(self, f'conv{i}_1x1', nn.Conv2d(c, w, kernel_size=1, bias=False))
        self.gated_fusion = GatedFusion(w, len(channels))
        self.se = SEModule(w)
        self.classifier = classifier(w, n_out, drop)

    def forward(self, xs):
        xs = [getattr(self, f'conv{i}_1x1')(x) for i, x in zip(self.layers, upsample(xs))]
        return self.classifier(self.se(self.gated_fusion(*xs)))


literal_heads = dict(pyramid=LiteralPyramid, gated=LiteralGated)


def literal_names(literal, state):
    "A library head's `state` under the names of `literal`: only the gated head's convolutions are called otherwise."
    if not hasattr(literal, 'layers'): return state
    for j, i in enumerate(literal.layers): state = {k.replace(f'convs.{j}.', f'conv{i}_1x1.'): v for k, v in state.items()}
    return state


def twin(name, head, channels, n_out, drop=.25):
    "A literal head with the weights of library head `head`."
    literal = literal_heads[name](channels, n_out, drop)
    literal.load_state_dict(literal_names(literal, head.state_dict()))
    return literal

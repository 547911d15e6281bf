"""Every architecture timm lists: both fusion heads, logits of the right shape, a split that covers each parameter once. And families for real."""
import random

import pytest
import timm
import torch
from torch.nn import functional as F

from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.models.split import stage_splitter
from sweep import check_backbone

ALL = timm.list_models()
SAMPLE = random.Random(60).sample([n for n in ALL if not n.startswith('gemma4')], 60)  # gemma4 cannot run on the meta device: slow

# the smallest of each family, and the image size it runs at
FAMILIES = {'test_resnet': 64, 'resnest14d': 64, 'resnet18d': 64, 'seresnextaa101d_32x8d': 64, 'regnetx_002': 64, 'test_efficientnet': 64,
            'efficientnet_lite0': 64, 'mobilenetv3_small_050': 64, 'mobilenetv4_conv_small_035': 64, 'convnext_atto': 64,
            'swin_tiny_patch4_window7_224': 112, 'test_vit': 64, 'vit_tiny_patch16_224': 64, 'test_maxvit': 64, 'test_coatnet': 64,
            'mambaout_femto': 64, 'hiera_tiny_224': 224, 'cspresnet50': 64, 'darknet17': 64, 'dla46_c': 64, 'vgg11': 64}
HEAVY = {'seresnextaa101d_32x8d', 'hiera_tiny_224', 'swin_tiny_patch4_window7_224', 'vgg11', 'cspresnet50', 'darknet17'}


@pytest.mark.parametrize('name', SAMPLE)
def test_sampled_backbone(name): check_backbone(name, sizes=False)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in ALL if n not in set(SAMPLE)])
def test_every_backbone(name): check_backbone(name, sizes=False)


@pytest.mark.parametrize('head', ['pyramid', 'gated'])
@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in FAMILIES])
def test_family_trains(name, head):
    "A few steps on two coloured classes bring the loss down, every stage moves, and frozen stages stay."
    torch.manual_seed(0)
    size = FAMILIES[name]
    model = multiscale_model(name, head, 2, pretrained=False, img_size=size, drop=0.).train()
    y = torch.tensor([0, 1, 0, 1])
    x = torch.randn(4, 3, size, size)*.3 + (y*2. - 1)[:, None, None, None]
    groups = stage_splitter(model)
    before = [[p.detach().clone() for p in g] for g in groups]
    for p in groups[0]: p.requires_grad_(False)
    opt, losses = torch.optim.Adam([p for g in groups[1:] for p in g], lr=1e-3), []
    for _ in range(4):
        opt.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        opt.step()
    assert all(o.isfinite() for o in losses) and losses[-1] < losses[0]
    moved = [any(not torch.equal(p, q) for p, q in zip(g, b)) for g, b in zip(groups, before)]
    assert moved == [False] + [True]*(len(groups) - 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_family_fine_tunes(name, image_folder, tmp_path):
    "One epoch of `fine_tune`, frozen and unfrozen, on real image files."
    size = FAMILIES[name]
    dls = image_dls(image_folder, size=size, bs=8, augment='light', num_workers=0, device='cpu')
    learn = fusion_learner(dls, name, head='gated', pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert all(torch.tensor(learn.recorder.values[-1]).isfinite()) and learn.get_preds()[0].shape[1] == len(dls.vocab)

"Attribution adds up: for every head that collapses, at any size, for any class."
import numpy as np
import pytest
import torch
from torch import nn

from mstoolkit.evaluate.attribution import grad_cam, plot_attribution, plot_shares, scale_attribution, scale_shares
from mstoolkit.models.fusion import GatedHead, MultiScaleModel, PlainHead, PyramidHead, multiscale_model


class Maps(nn.Module):
    "A body whose maps are given: what a backbone of these widths and strides might return."
    def __init__(self, channels, strides):
        super().__init__()
        self.channels, self.strides = channels, strides
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(channels, strides))

    def forward(self, x): return [conv(x).relu() for conv in self.convs]


def random_case(i):
    "The i-th model, images and question."
    rng = np.random.default_rng(i)
    torch.manual_seed(i)
    k, n_out = int(rng.integers(2, 5)), int(rng.integers(2, 30))
    channels, strides = [int(rng.integers(4, 40)) for _ in range(k)], [4, 8, 16, 32][-k:]
    head = [PlainHead, PyramidHead, GatedHead][i % 3](channels, n_out)
    for p in head.parameters(): nn.init.normal_(p, std=float(rng.uniform(.05, .5)))
    h, w = (int(o) for o in rng.integers(32, 150, 2))
    net = MultiScaleModel(Maps(channels, strides), head)
    x = torch.randn(int(rng.integers(1, 4)), 3, h, w)
    c1, c2 = (int(o) for o in rng.integers(0, n_out, 2))
    return net, x, [dict(target=c1), dict(), dict(compare=(c1, c2)), dict(compare=(c1, None))][int(rng.integers(4))]


def asked(logits, target=None, compare=None):
    "The quantity that is to be explained, from the logits alone."
    if compare is None: return logits.max(1)[0] if target is None else logits[:, target]
    a, b = compare
    return logits[:, a] - (logits[:, b] if b is not None else (logits.sum(1)-logits[:, a])/(logits.shape[1]-1))


def test_maps_and_bias_sum_to_the_logit_of_200_random_models():
    worst = 0
    for i in range(200):
        net, x, question = random_case(i)
        a = scale_attribution(net, x, **question)
        with torch.no_grad(): want = asked(net.eval().forward_spatial(x), **question)   # by way of the literal, upsampled head
        err = (a.totals.sum(1) + a.bias - want).abs()
        size = want.abs() + a.totals.abs().sum(1) + a.bias.abs()
        worst = max(worst, (err/size).max().item())
        assert (err <= 1e-4*want.abs() + 1e-6*size).all(), (i, err, want)
        assert a.shares.sum(1) == pytest.approx(torch.ones(len(x)).numpy(), abs=1e-4) or not a.totals.any()
    assert worst < 1e-5
    print(f'worst error {worst:.1e} of the sum of magnitudes')


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext', 'test_vit', 'vit_tiny_patch16_224'])
def test_real_backbones(backbone):
    torch.manual_seed(0)
    kw = dict(img_size=96) if backbone.startswith(('vit', 'test_vit')) else {}
    net = multiscale_model(backbone, 'gated', 7, pretrained=False, **kw).eval()
    x = torch.randn(2, 3, 96, 96)
    a = scale_attribution(net, x, 3)
    assert a.totals.sum(1) + a.bias == pytest.approx(net(x)[:, 3].detach().numpy(), rel=1e-4, abs=1e-5)


def test_removing_a_position_removes_its_contribution():
    "In a plain head, whose scales and gates are constant, each position is worth what its map says."
    torch.manual_seed(0)
    net, x = multiscale_model('test_resnet', 'plain', 4, pretrained=False).eval(), torch.randn(1, 3, 96, 96)
    a, xs = scale_attribution(net, x, 2), net[0](x)
    xs[-1] = xs[-1].clone()
    xs[-1][..., 1, 2] = 0
    assert (a.logit - net[1](xs)[:, 2]).item() == pytest.approx(a.maps[0][0, 1, 2].item(), rel=1e-3, abs=1e-6)


def test_gates_and_contributions_follow_the_gates():
    torch.manual_seed(0)
    net, x = multiscale_model('test_resnet', 'gated', 4, pretrained=False), torch.randn(3, 3, 64, 64)
    assert scale_attribution(multiscale_model('test_resnet', 'pyramid', 4, pretrained=False), x).gates is None
    nn.init.constant_(net[1].gated_fusion.mlp[2].weight, 0)
    assert torch.equal(scale_attribution(net, x).gates, torch.full((3, 3), .5))


def test_nothing_of_the_model_is_changed():
    net = multiscale_model('test_resnet', 'gated', 4, pretrained=False)
    net[0].eval()                                         # frozen batch norm below a head that trains
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scale_attribution(net, torch.randn(2, 3, 64, 64))
    grad_free = [p.grad is None for p in net.parameters()]
    assert all(grad_free) and not net[0].training and net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('kw,what', [
    (dict(target='cat'), 'no names of classes'), (dict(target=9), 'out of range'), (dict(target=-1), 'out of range'),
    (dict(target=[1, 2]), '2 targets and 3 images'),
    (dict(target=1, compare=(1, 2)), 'either a target or two classes'), (dict(compare=(1,)), 'two classes')])
def test_bad_questions_are_named(kw, what):
    net = multiscale_model('test_resnet', 'gated', 4, pretrained=False)
    with pytest.raises(ValueError, match=what): scale_attribution(net, torch.randn(3, 3, 64, 64), **kw)


@pytest.mark.parametrize('make', [lambda: multiscale_model('test_resnet', 'mlp', 4, pretrained=False), lambda: nn.Linear(3, 4),
                                  lambda: multiscale_model('test_resnet', 'gated', 4, pretrained=False, act='gelu')])
def test_what_is_no_sum_is_refused(make):
    with pytest.raises(ValueError, match='use grad_cam'): scale_attribution(make(), torch.randn(1, 3, 64, 64))


def test_names_of_classes_come_with_a_classifier():
    class Named: header = type('H', (), dict(classes=['2', '10', 'ant', 'bee']))
    Named.model = multiscale_model('test_resnet', 'gated', 4, pretrained=False)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(scale_attribution(Named, x, 'ant').logit, scale_attribution(Named.model, x, 2).logit)
    assert torch.equal(scale_attribution(Named, x, compare=('10', 'bee')).logit, scale_attribution(Named.model, x, compare=(1, 3)).logit)
    with pytest.raises(ValueError, match="did you mean 'ant'"): scale_attribution(Named, x, 'ants')
    df = scale_shares(Named, [(x, torch.tensor([0, 3])), (x, torch.tensor([3, 1]))])
    assert df.n.to_dict() == {'2': 1, '10': 1, 'bee': 2}
    assert list(df.columns) == ['n', *(f'{k}_{s}' for k in ('share', 'gate') for s in (8, 16, 32))]
    assert df.filter(like='share').sum(axis=1).to_numpy() == pytest.approx(np.ones(3))


def test_figures_have_a_panel_for_each_scale():
    import matplotlib.pyplot as plt
    net, x = multiscale_model('test_resnet', 'gated', 4, pretrained=False), torch.randn(2, 3, 64, 80)
    fig = plot_attribution(scale_attribution(net, x), x.sigmoid(), titles=['a', 'b'])
    assert len(fig.axes) == 2*4 + 2
    assert len(plot_shares(scale_shares(net, [(x, torch.tensor([0, 1]))])).axes) == 2
    plt.close('all')


def test_grad_cam_finds_what_decides():
    pytest.importorskip('pytorch_grad_cam')
    class Bright(nn.Module):
        "One map, and the brightness of its mean as the logit."
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1, bias=False)
            nn.init.constant_(self.conv.weight, 1)
        def forward(self, x): return torch.stack([-(m := self.conv(x).mean((1, 2, 3))), m], 1)
    x = torch.zeros(1, 3, 32, 32); x[..., 4:12, 20:28] = 1
    net = Bright()
    with pytest.raises(ValueError, match='name the layer'): grad_cam(net, x)
    runs = []
    net.register_forward_hook(lambda *a: runs.append(1))
    cam = grad_cam(net, x, 1, layer=net.conv)[0]
    assert cam[4:12, 20:28].min() > .9 and cam[16:].max() < .1
    assert torch.equal(grad_cam(net, x, layer=net.conv)[0], cam) and len(runs) == 2  # 1 is what is predicted; one pass each
    for wrong in 2, -1:
        with pytest.raises(ValueError, match=f'class {wrong} is out of range: the model has 2 classes'): grad_cam(net, x, wrong, layer=net.conv)
    assert grad_cam(multiscale_model('test_vit', 'mlp', 4, pretrained=False, img_size=96), torch.randn(2, 3, 96, 96)).shape == (2, 96, 96)

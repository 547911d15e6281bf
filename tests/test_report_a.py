"""Report A's checkpoints: a literal model under the report's own key names predicts the same after conversion."""
import numpy as np
import pytest
import timm
import torch
from torch import nn

from literal import literal_heads
from mstoolkit.models.report_a import load_report_a, read_report_a, recognise


class MultiScaleResNeSt(nn.Module):
    "The report's `MultiScaleResNeStSE` and `MultiScaleGatedSE_ResNeSt101e` (figures 6 and 8): the backbone's layers, then the head's, side by side."
    def __init__(self, backbone, head, n_out):
        super().__init__()
        net = timm.create_model(backbone, num_classes=0)
        self.conv1, self.bn1, self.act, self.maxpool = net.conv1, net.bn1, getattr(net, 'act', nn.ReLU(inplace=True)), net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.head = [literal_heads[head]([net.feature_info[i]['num_chs'] for i in (2, 3, 4)], n_out)]  # in a list, so that its keys have no prefix
        for k, m in self.head[0].named_children(): self.add_module(k, m)

    def forward(self, x):
        x = self.layer1(self.maxpool(self.act(self.bn1(self.conv1(x)))))
        xs = [x2 := self.layer2(x), x3 := self.layer3(x2), self.layer4(x3)]
        return self.head[0](xs)


def report_model(backbone, head, n_out):
    torch.manual_seed(0)
    return (timm.create_model(backbone, num_classes=n_out) if head == 'plain' else MultiScaleResNeSt(backbone, head, n_out)).eval()


@pytest.mark.parametrize('backbone', ['resnest14d', pytest.param('resnest101e', marks=pytest.mark.slow)])
@pytest.mark.parametrize('head,file', [('plain', 'resnest_best.pt'), ('pyramid', 'pyramid_best.pt'), ('gated', 'gate_best.pt')])
def test_report_checkpoint_predicts_the_same(head, file, backbone, tmp_path):
    theirs = report_model(backbone, head, 100)
    torch.save(theirs.state_dict(), tmp_path/file)
    ckpt = read_report_a(tmp_path/file, backbone)
    assert (ckpt.head, ckpt.n_out, ckpt.n_stages, ckpt.backbone) == (head, 100, 3, backbone)
    ours, x = load_report_a(tmp_path/file, backbone), torch.randn(4, 3, 96, 80)
    with torch.no_grad(): a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(a.argmax(1), b.argmax(1)) and not ours.training


def test_default_backbone_is_the_reports():
    with torch.device('meta'): state = MultiScaleResNeSt('resnest101e', 'gated', 100).state_dict()
    assert recognise(state).head == 'gated' and {k: v.shape for k, v in recognise(state).state.items()}['1.convs.2.weight'] == (1024, 2048, 1, 1)


@pytest.mark.parametrize('wrap', [lambda s: {f'module.{k}': v for k, v in s.items()}, lambda s: dict(state_dict=s, epoch=40, best=.92)],
                         ids=['ddp', 'nested'])
def test_wrapped_checkpoints(wrap, tmp_path):
    torch.save(wrap(report_model('resnest14d', 'gated', 5).state_dict()), tmp_path/'w.pt')
    assert read_report_a(tmp_path/'w.pt', 'resnest14d').n_out == 5


def test_squeeze_excite_written_with_convolutions(tmp_path):
    state = report_model('resnest14d', 'pyramid', 5).state_dict()
    torch.save({k: v[..., None, None] if k.startswith('se.fc') else v for k, v in state.items()}, tmp_path/'w.pt')
    load_report_a(tmp_path/'w.pt', 'resnest14d')


@pytest.mark.parametrize('head', ['plain', 'pyramid', 'gated'])
def test_another_backbone_is_refused(head, tmp_path):
    torch.save(report_model('resnest14d', head, 5).state_dict(), tmp_path/'w.pt')
    says = "'resnest101e' are missing or have another shape.*name the backbone"
    with pytest.raises(ValueError, match=says) as e: load_report_a(tmp_path/'w.pt')
    assert '\n' not in str(e.value) and 'w.pt' in str(e.value)


def test_files_of_other_kinds(tmp_path):
    f = tmp_path/'w.pt'
    torch.save({'a': torch.ones(2)}, f)
    with pytest.raises(ValueError, match='is not a checkpoint of Report A: no head of Report A among 1 tensors'): read_report_a(f)
    torch.save(dict(state_dict={'a': torch.ones(2)}, best=np.float64(.92)), f)
    with pytest.raises(ValueError, match='pickled numpy.*could run code'): read_report_a(f)
    torch.save(report_model('resnest14d', 'pyramid', 5), f)
    with pytest.raises(ValueError, match='MultiScaleResNeSt besides tensors'): read_report_a(f)
    for junk in (b'', b'junk\n', b'no weights at all', bytes(99)):
        f.write_bytes(junk)
        with pytest.raises(ValueError, match='w.pt'): read_report_a(f)
    with pytest.raises(FileNotFoundError, match='no weights file'): read_report_a(tmp_path/'none.pt')


def test_missing_and_foreign_tensors(tmp_path):
    state = report_model('resnest14d', 'gated', 5).state_dict()
    with pytest.raises(ValueError, match="1 of .* tensors of backbone 'resnest14d' are missing"):
        recognise({k: v for k, v in state.items() if k != 'layer1.0.conv1.weight'}, 'resnest14d')
    with pytest.raises(ValueError, match="tensor 'layer9.w' has no place"): recognise(state | {'layer9.w': torch.ones(1)}, 'resnest14d')
    del state['se.fc.0.weight']
    torch.save(state, tmp_path/'w.pt')
    with pytest.raises(ValueError, match="does not fit head 'gated'.*se.fc.0.weight"): load_report_a(tmp_path/'w.pt', 'resnest14d')


def test_plain_head_is_refused_where_timm_has_more(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=5).state_dict(), tmp_path/'v.pt')
    with pytest.raises(ValueError, match="'norm.weight' has no place|more than a mean"): load_report_a(tmp_path/'v.pt', 'test_vit')

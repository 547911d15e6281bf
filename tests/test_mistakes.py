"What users' mistakes and odd data end in: a line that says so, never a wrong result without a word; each with its kin."
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from corpus import RGB, exif, save
from mstoolkit.ablation import Study
from mstoolkit.classifier import Classifier
from mstoolkit.cli import main
from mstoolkit.core import RunError, import_plugins
from mstoolkit.data.check import check_data, check_samples
from mstoolkit.data.core import image_dls
from mstoolkit.data.image import ImageError, read_image
from mstoolkit.data.sources import (DataSource, Sample, class_names, image_format, left_aside, list_samples, read_classes, source_samples,
                                    table_samples)
from mstoolkit.models.fusion import heads
from mstoolkit.recipe import Recipe
from mstoolkit.runs import Run, read_env, read_history, read_study
from PIL import Image


def samples(*labels): return [Sample(Path(f'{i}.jpg'), o) for i, o in enumerate(labels)]


def kinds(found): return {f.kind for f in found.findings}


def said(capsys, *words, code=2):
    "The one line that a command leaves on standard error."
    capsys.readouterr()
    assert main([str(o) for o in words]) == code
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith('mstoolkit: '), err
    return err[0]


# 3: labels that are numbers

@pytest.mark.parametrize('labels', [('1', '2'), ('1', '2', '3'), ('01', '02'), ('7', '3')])
def test_numbers_that_may_count_from_one_are_an_error(labels, tmp_path):
    names = [f'n{i}' for i in range(8)]
    with pytest.raises(ValueError, match='none is 0.*write the list as CSV with the columns name and number'):
        class_names(samples(*labels), [], names)


def test_a_list_with_numbers_says_what_they_mean(tmp_path):
    (tmp_path/'c.csv').write_text('name,number\nb,2\na,1\nc,3\n')
    assert class_names(samples('1', '3', '2'), samples('3'), tmp_path/'c.csv')[0] == ['a', 'b', 'c']
    assert [s.label for s in class_names(samples('1', '3', '02'), [], tmp_path/'c.csv')[1]] == ['a', 'c', 'b']
    with pytest.raises(ValueError, match='label 4 has no name: the class list has the numbers 1 to 3'):
        class_names(samples('1', '4'), [], tmp_path/'c.csv')
    (tmp_path/'c.csv').write_text('name,number\na,1\nb,1\n')
    with pytest.raises(ValueError, match='number 1 to two classes'): class_names(samples('1', '2'), [], tmp_path/'c.csv')
    assert [s.label for s in class_names(samples('0', '2'), [], ['a', 'b', 'c'])[1]] == ['a', 'c']  # from 0, a list will do
    # an image of class 0 in validation alone shows where the numbers begin; that it cannot be learnt is said
    with pytest.raises(ValueError, match="class 'a' is in the validation set"): class_names(samples('1', '2'), samples('0'), ['a', 'b', 'c'])


def test_check_and_train_tell_of_listed_classes_without_an_image(image_folder, tmp_path, capsys):
    (tmp_path/'c.txt').write_text('2\n10\nred apple\npear\n')
    found = check_data(image_folder, classes=str(tmp_path/'c.txt'))
    assert any('without an image' in f.text and "'pear'" in f.text for f in found.findings)
    tr, va = source_samples(DataSource(image_folder))
    assert any("'pear'" in f.text for f in check_samples(tr, va, image_folder, classes=['2', '10', 'red apple', 'pear']).findings)
    assert 'unknown class' in kinds(check_samples(samples('1', '2'), [], tmp_path, classes=['a', 'b', 'c']))


# 5: what is passed over, and HEIC

def test_files_that_are_passed_over_are_counted_by_ending(image_folder, tmp_path, tiny_options, capsys):
    jpeg = save(RGB, 'JPEG')
    for name in ('a.jpg_large', 'b.jpg_large', 'c.jpg.bak'): (image_folder/'train'/'2'/name).write_bytes(jpeg)
    for name in ('notes.txt', '.hidden.xyz'): (image_folder/'train'/'10'/name).write_text('words')
    f = {f.level: f for f in check_data(image_folder).findings if f.kind == 'passed over'}
    assert '3 files passed over for the ending: 2 .jpg_large, 1 .bak; by content they are images' in f['warning'].text
    assert f['note'].text == '1 file passed over for the ending: 1 .txt'
    capsys.readouterr()
    assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options]) == 0
    out = capsys.readouterr().out
    assert 'warning: 3 files passed over' in out and 'note: 1 file passed over' in out and "left aside: folder 'test'" in out


def heic(**kw):
    from pillow_heif import register_heif_opener
    register_heif_opener()
    out = BytesIO()
    Image.fromarray(np.ascontiguousarray(cv2.resize(RGB, (80, 64)))).save(out, 'HEIF', quality=95, **kw)
    return out.getvalue()


@pytest.mark.parametrize('name', ['a.HEIC', 'a.heif', 'a.jpg'])
def test_heic_is_read_where_it_can_be_and_named_where_not(name, tmp_path, monkeypatch):
    (tmp_path/name).write_bytes(heic())
    assert image_format((tmp_path/name).read_bytes()) == 'HEIF'
    assert abs(read_image(tmp_path/name).astype(int)-cv2.resize(RGB, (80, 64))).mean() < 4
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    with pytest.raises(ImageError, match=r'HEIC.*pip install mstoolkit\[heic\]'): read_image(tmp_path/name)


def test_a_turned_heic_is_upright(tmp_path):
    (tmp_path/'a.heic').write_bytes(heic(exif=exif(6).tobytes()))
    assert read_image(tmp_path/'a.heic').shape == (80, 64, 3)


# 8: what decoders say

def zeroed():
    d = bytearray(save(cv2.resize(RGB, (640, 480)), 'JPEG', quality=95))
    d[len(d)//2:len(d)//2+3000] = bytes(3000)
    return bytes(d)


def closed_again():
    d = save(cv2.resize(RGB, (640, 480)), 'JPEG', quality=95)
    return d[:len(d)//2]+b'\xff\xd9'


@pytest.mark.parametrize('make', [zeroed, closed_again, lambda: closed_again()[:-2]+b'\xff\xd9junk after the end'])
def test_decoder_warnings_come_with_the_name(make, tmp_path, capfd):
    (tmp_path/'odd.jpg').write_bytes(make())
    read_image(tmp_path/'odd.jpg')
    read_image(tmp_path/'odd.jpg')  # it is said once
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith(f'warning: {tmp_path}/odd.jpg: ') and 'may be missing' in err[0]


def test_check_lists_files_that_decode_with_warnings(tmp_path, capfd):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(150):
            im = np.roll(cv2.resize(RGB, (64, 64)), i*7+(c == 'b')*3, axis=1)
            (tmp_path/c/f'{i}.jpg').write_bytes(save(im, 'JPEG'))
    (tmp_path/'b'/'77.jpg').write_bytes(zeroed())
    (tmp_path/'b'/'99.jpg').write_bytes(closed_again())
    found = next(f for f in check_data(tmp_path).findings if f.kind == 'decoder warning')
    assert found.level == 'warning' and [Path(o[0]).name for o in found.files] == ['77.jpg', '99.jpg']
    assert 'Corrupt JPEG' not in capfd.readouterr().err


# 10: names that look alike

@pytest.mark.parametrize('twin', ['hat', 'Hat ', 'HAT', 'Caf\u00e9 Cafe\u0301'])
def test_class_names_that_look_alike(twin):
    a, b = ('Caf\u00e9', 'Cafe\u0301') if 'Caf' in twin else ('Hat', twin)
    f = [f for f in check_samples(samples(a, a, b, b, 'coat'), [], '.').findings if f.kind == 'twin classes']
    assert len(f) == 1 and f[0].level == 'warning' and repr(a) in f[0].text
    assert not [f for f in check_samples(samples('hat', 'cap', 'hats'), [], '.').findings if f.kind == 'twin classes']


@pytest.mark.parametrize('head, why', [('path,label,label', "two columns 'label'"), ('path, label ,label', "two columns 'label'"),
                                       ('Path,Label', "call 'Path' 'path'"), ('path;label;split;split', "two columns 'split'")])
def test_table_headers(head, why, tmp_path):
    sep = ';' if ';' in head else ','
    (tmp_path/'t.csv').write_text(head+'\n'+sep.join(['a.jpg', *['x']*(len(head.split(sep))-1)])+'\n')
    with pytest.raises(ValueError, match=why): table_samples(tmp_path/'t.csv', tmp_path)


def test_a_csv_with_tabs_is_read(tmp_path):
    (tmp_path/'t.csv').write_text('path\tlabel\na, b.jpg\tx\nc.jpg\ty\n')
    assert [(s.path.name, s.label) for s in table_samples(tmp_path/'t.csv', tmp_path)[0]] == [('a, b.jpg', 'x'), ('c.jpg', 'y')]


# 11: long metadata

@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_jpeg_with_long_metadata_is_good(n, tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(4):
            d, seg = save(np.roll(RGB, i*9+(c == 'b'), 0), 'JPEG'), b'\xff\xe2'+struct.pack('>H', 65535)+b'ICC_PROFILE\0'+bytes(65521)
            (tmp_path/c/f'{i}.jpg').write_bytes(d[:2]+seg*n+d[2:])
    assert not [f for f in check_data(tmp_path, fast=True).findings if f.level == 'error']
    assert check_data(tmp_path, fast=True).formats == {'JPEG': 8}
    (tmp_path/'a'/'0.jpg').write_bytes((tmp_path/'a'/'0.jpg').read_bytes()[:65000])
    assert 'unreadable: truncated' in kinds(check_data(tmp_path, fast=True))


# 14, 15: processes that die

def test_a_killed_loader_process_is_one_line(image_folder, trained):
    files, clf = sorted((image_folder/'train').rglob('*.png')), Classifier.load(trained)
    with pytest.raises(RunError, match='a loader process died.*--num-workers') as e:
        for _ in clf.batches(files*20, bs=2, num_workers=1):
            for p in multiprocessing.active_children(): p.kill()
    assert '\n' not in str(e.value)
    subprocess.run(['true'])  # another process ends: nothing is told twice


@pytest.mark.parametrize('error, code, words', [
    (RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'), 2, 'no memory is left'), (MemoryError(), 2, 'smaller --bs or --size'),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"), 2, '--bs'),
    (KeyError('x'), 1, 'a mistake of ours, KeyError: .*please report it.*MSTOOLKIT_TRACEBACK=1'),
    (RuntimeError('shapes do not fit'), 1, 'a mistake of ours, RuntimeError: shapes'),
    (ValueError('Exception occured in `StopOnNaN` when calling event `after_train`:\n\tthe loss is no number'), 2, '^mstoolkit: the loss')])
def test_every_error_is_one_line(error, code, words, image_folder, monkeypatch, capsys):
    def fail(*_, **__): raise error
    monkeypatch.setattr('mstoolkit.data.check.check_data', fail)
    assert re.search(words, said(capsys, 'check', image_folder, code=code))
    monkeypatch.setenv('MSTOOLKIT_TRACEBACK', '1')
    with pytest.raises(type(error)): main(['check', str(image_folder)])


@pytest.mark.parametrize('words, what', [(['train', '--colour'], 'No such option'), (['predict'], 'Missing argument'), (['tarin'], 'No such command'),
                                         (['params', '--classes', 'x'], "Invalid value for '--classes', 'x'")])
def test_words_that_no_command_knows(words, what, capsys):
    line = said(capsys, *words)
    assert what in line and '--help shows what there is' in line


@pytest.mark.skipif(sys.platform != 'linux', reason='the signal at the parent\'s death is of Linux')
def test_a_loader_process_ends_with_its_parent(tmp_path):
    code = '''
import os, sys, time
from mstoolkit.data.workers import Workers
def do(x): return (x,)
w = Workers(lambda x: (os.getpid(),), 1)
for pid, in w.run([(0,), (1,)]): print(pid, flush=True)
time.sleep(60)
'''
    with subprocess.Popen([sys.executable, '-c', code], stdout=-1, text=True) as p:
        pid = int(p.stdout.readline())
        p.kill()
    for _ in range(100):
        if not Path(f'/proc/{pid}').exists() or Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z': break
        time.sleep(.1)
    else: raise AssertionError(f'{pid} lives')


def test_a_process_that_comes_too_late_for_its_parent_ends(tmp_path):
    code = 'from mstoolkit.data.workers import prepare_worker; prepare_worker(0, parent=1 << 22); print("lives")'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == ((1, '') if sys.platform == 'linux' else (0, 'lives\n'))


# 21: names that become folders

@pytest.mark.parametrize('name', ['../../x', '/tmp/x', 'a/b', '.hidden', '', ' x', 'a\\b', 'c:x', 'a\nb'])
def test_names_stay_in_their_folder(name):
    with pytest.raises(ValueError, match='cannot name a recipe'): Recipe(name=name)
    with pytest.raises(ValueError, match='cannot name a study'): Study(name, dict(a={}, b={}))
    with pytest.raises(ValueError, match='cannot name a cell'): Study('s', {name: {}, 'b': {}})


# 22: edited run folders

@pytest.mark.parametrize('text', ['[]', '{', '{"data": 3}', '{"versions": []}', '{"epochs": "many"}', '{"command": {}}', '['*100_000])
def test_an_edited_environment_is_named(text, tmp_path):
    (tmp_path/'environment.json').write_text(text)
    with pytest.raises(ValueError, match='environment.json.*is damaged'): read_env(tmp_path)


@pytest.mark.parametrize('text', ['', 'epoch,train_loss\n1,2\n', 'epoch,train_loss,valid_loss,seconds\n1,x,2,3\n', '\x00\x01'])
def test_an_edited_history_is_named(text, tmp_path):
    (tmp_path/'history.csv').write_text(text)
    with pytest.raises(ValueError, match='history.csv.*is damaged'): read_history(tmp_path)


@pytest.mark.parametrize('text', ['[]', '{"cells": []}', '{"cells": {}, "base": 3}', ''])
def test_an_edited_study_is_named(text, tmp_path):
    (tmp_path/'study.json').write_text(text)
    with pytest.raises(ValueError, match='study.json.*is damaged'): read_study(tmp_path)


def test_a_run_that_is_not_there_is_one_short_line(tmp_path, capsys):
    assert said(capsys, 'report', tmp_path/'no').endswith(f"there is no run folder '{tmp_path}/no'")
    with pytest.raises(FileNotFoundError, match='is not a finished run folder'): Run(tmp_path)


@pytest.mark.parametrize('where', ['new', 'train'])
def test_one_level_too_high(where, tmp_path, capsys):
    "A folder whose class folders hold folders alone: which of them are the classes, nobody can know."
    tmp_path, out = tmp_path/'data', tmp_path/'run'
    for i, (a, b) in enumerate([(where, 'hat'), (where, 'cap'), ('old', 'hat'), ('old', 'cap')]): fill(tmp_path/a/b, 3, 10*i)
    if where == 'train': (tmp_path/'train').rename(tmp_path/'entra\u00eenement')
    with pytest.raises(ValueError, match="they hold only folders: 'cap', 'hat'"): source_samples(tmp_path)
    assert not check_data(tmp_path).ok
    assert 'hold only folders' in said(capsys, 'train', tmp_path, '--no-pretrained', '--backbone', 'test_resnet', '--out', out)
    fill(tmp_path/'direct', 3, 90)  # folders within some classes are nobody's business
    assert len(source_samples(tmp_path)[0]) == 15


# 23: one image a class, no training folder

def fill(folder, n, seed=0):
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(np.random.default_rng(seed+i).integers(0, 256, (40, 40, 3), np.uint8)).save(folder/f'{i}.png')


def test_one_image_a_class(tmp_path):
    fill(tmp_path/'a', 1), fill(tmp_path/'b', 1, 10)
    assert not check_data(tmp_path).ok and 'no validation' in kinds(check_data(tmp_path))
    fill(tmp_path/'c', 3, 20)
    assert check_data(tmp_path).ok and any('which validation will not see' in f.text for f in check_data(tmp_path).findings)


def test_a_folder_with_held_out_images_alone(tmp_path):
    fill(tmp_path/'val'/'a', 2), fill(tmp_path/'val'/'b', 2, 10)
    found = check_data(tmp_path)
    assert 'no classes' in kinds(found) or 'one class' in kinds(found)
    assert not [k for k in kinds(found) if 'leak' in k or 'conflict' in k]


# 24: cells and lines

@pytest.mark.parametrize('column, cell', [('split', ''), ('label', ''), ('path', '')])
def test_empty_cells_are_named_by_row(column, cell, tmp_path):
    df = pd.DataFrame(dict(path=['a.jpg', 'b.jpg', 'c.jpg'], label=['x', 'y', 'x'], split=['train', 'train', 'valid']))
    df.loc[1, column] = cell
    df.to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(ValueError, match=f'1 row of the table with no {column}: row 2, counted'): table_samples(tmp_path/'t.csv', tmp_path)


@pytest.mark.parametrize('line, path, label', [
    ('a, b.jpg 3', 'a, b.jpg', '3'), ('a b.jpg,3', 'a b.jpg', '3'), ('a b.jpg 3', 'a b.jpg', '3'), ('"a, b.jpg",3', 'a, b.jpg', '3'),
    ('a, b.jpg\t3', 'a, b.jpg', '3'), ('none.jpg,3', 'none.jpg', '3')])
def test_lines_of_a_list(line, path, label, tmp_path):
    for name in ('a, b.jpg', 'a b.jpg'): (tmp_path/name).touch()
    (tmp_path/'l.txt').write_text(line+'\n')
    assert [(s.path.name, s.label) for s in list_samples(tmp_path/'l.txt', tmp_path)] == [(path, label)]


def test_a_list_that_is_in_two_places(tmp_path, monkeypatch):
    (tmp_path/'data').mkdir(), (tmp_path/'data'/'t.txt').write_text('a.jpg,x\n'), (tmp_path/'t.txt').write_text('b.jpg,y\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'t.txt' is here and in"): DataSource('data', train='t.txt').file('train')
    monkeypatch.chdir(tmp_path/'data')
    assert DataSource('.', train='t.txt').file('train').is_file()  # one and the same


def test_what_is_left_aside(tmp_path):
    df = pd.DataFrame(dict(path=list('abcd'), label=list('xyxy'), split=['train', 'train', 'Test', 'val']))
    assert left_aside(DataSource(tmp_path, csv=df)) == '1 row of the test split'
    assert left_aside(DataSource(tmp_path, csv=df.drop(columns='split'))) == ''
    (tmp_path/'Testing').mkdir()
    assert left_aside(tmp_path) == "folder 'Testing'"


@pytest.mark.parametrize('kw', [dict(), dict(folds=3)])
def test_a_share_that_nothing_is_held_out_by(image_folder, kw):
    with pytest.raises(ValueError, match='valid_pct=0.3 has no effect'): image_dls(image_folder, size=32, valid_pct=.3, num_workers=0, **kw)
    assert len(image_dls(image_folder, size=32, valid_pct=.3, valid='none', num_workers=0).valid_ds)


# 25: outputs that are closed

@pytest.mark.parametrize('redirect', ['>&-', '2>&-', '>&- 2>&-', '| head -1', '2>&1 | head -c 1'])
def test_a_closed_output_ends_no_training(redirect, image_folder, tmp_path, tiny_options):
    words = ' '.join(f"'{o}'" for o in ['train', image_folder, '--out', tmp_path/'run', *tiny_options, '--epochs', '2'])
    subprocess.run(['bash', '-c', f"'{sys.executable}' -m mstoolkit {words} {redirect}"], capture_output=True)
    assert 'epochs' in read_env(tmp_path/'run')


# 26: spreadsheets

@pytest.mark.parametrize('name', ['=1+1', '+a', '-a', '@SUM(A1)'])
def test_names_that_are_formulas_are_told(name, image_folder, tmp_path, trained, capsys):
    odd = image_folder/'test'/f'{name}.png'
    Image.fromarray(RGB).save(odd)
    capsys.readouterr()
    assert main(['predict', str(trained), str(image_folder/'test'), '--out', str(tmp_path/'p.csv'), '--num-workers', '0']) == 0
    assert f"1 image name such as '{name}' would be a formula" in capsys.readouterr().err
    (image_folder/'train'/name).mkdir()
    for i in range(3): Image.fromarray(np.roll(RGB, i*9, 0)).save(image_folder/'train'/name/f'{i}.png')
    assert 'formula' in kinds(check_data(image_folder))


# friction

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    from mstoolkit.models.fusion import multiscale_model
    from mstoolkit.classifier import ModelHeader
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).eval()
    header = ModelHeader(config=model.config, classes=['2', '10', 'red apple'], size=32, mean=(.5,)*3, std=(.5,)*3, metrics={})
    return Classifier(model, header).save(tmp_path_factory.mktemp('model')/'m.safetensors')


def test_predict_to_standard_output_and_over_a_file(trained, image_folder, tmp_path, capsys):
    words = ['predict', str(trained), str(image_folder/'test'), '--num-workers', '0']
    assert main([*words, '--out', '-']) == 0
    out = capsys.readouterr()
    assert out.out.splitlines()[0] == 'image_name,pred_label' and len(out.out.splitlines()) == 10 and '9 predictions' in out.err
    assert '--zip writes a file' in said(capsys, *words, '--out', '-', '--zip')
    (tmp_path/'p.csv').write_text('mine')
    assert '--force' in said(capsys, *words, '--out', tmp_path/'p.csv') and (tmp_path/'p.csv').read_text() == 'mine'
    assert main([*words, '--out', str(tmp_path/'p.csv'), '--force']) == 0 and len(pd.read_csv(tmp_path/'p.csv')) == 9
    (tmp_path/'d').mkdir(), (tmp_path/'d'/'x').touch()
    assert 'move it away' in said(capsys, *words, '--out', tmp_path/'d', '--force')  # a folder is never replaced


_plugin = '''
import torch
from torch import nn
from mstoolkit.models.fusion import register_head
@register_head('{0}')
class Mine(nn.Module):
    def __init__(self, channels, n_out):
        super().__init__()
        self.linear = nn.Linear(channels[-1], n_out)
    def forward(self, maps): return self.linear(maps[-1].mean((2, 3)))
'''


@pytest.mark.parametrize('as_file', [True, False])
def test_a_head_of_ones_own_from_the_command_line(as_file, image_folder, tmp_path, tiny_options, monkeypatch, capsys):
    name = f'my_heads_{as_file}'
    (tmp_path/f'{name}.py').write_text(_plugin.format(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setenv('MSTOOLKIT_PLUGINS', '')
    plugin = ['--plugin', f'{name}.py' if as_file else name]
    assert main(['train', str(image_folder), '--out', 'run', *tiny_options, '--head', name, *plugin]) == 0
    run = [sys.executable, '-m', 'mstoolkit', 'predict', 'run', str(image_folder/'test'), '--num-workers', '0']
    env = {k: v for k, v in os.environ.items() if k != 'MSTOOLKIT_PLUGINS'}
    without = subprocess.run(run, capture_output=True, text=True, env=env)
    assert without.returncode == 2 and f"unknown head '{name}'" in without.stderr and '--plugin' in without.stderr
    assert subprocess.run([*run, *plugin], env=env).returncode == 0
    assert os.environ['MSTOOLKIT_PLUGINS']  # what a study's processes import
    del heads[name]  # for the tests that follow


@pytest.mark.parametrize('plugin, why', [('nothing_called_so', 'cannot be imported: ModuleNotFoundError'), ('no.py', 'there is no plugin'),
                                         ('broken.py', 'cannot be imported: ZeroDivisionError'), ('json.py', 'is called as another module')])
def test_bad_plugins(plugin, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    (tmp_path/'broken.py').write_text('1/0'), (tmp_path/'json.py').touch()
    with pytest.raises((ValueError, FileNotFoundError), match=why): import_plugins([plugin])


def test_threads(image_folder, tmp_path, tiny_options):
    before = torch.get_num_threads()
    try:
        assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options, '--threads', '3']) == 0
        assert read_env(tmp_path/'run')['processors'] == 3
    finally: torch.set_num_threads(before)


# what half an hour of breaking it found

@pytest.mark.parametrize('column, cells', [('Split', ['train', 'train', 'test']), ('set', ['train', 'val', 'test']), ('is_valid', ['0', '0', '1'])])
def test_a_column_that_means_split_is_not_passed_over(column, cells, tmp_path):
    df = pd.DataFrame({'path': list('abc'), 'label': list('xyx'), column: cells})
    with pytest.raises(ValueError, match=f"column '{column}' of the table says what is held out"): table_samples(df, tmp_path)
    assert len(table_samples(df.rename(columns={column: 'other'}).assign(other=list('uvw')), tmp_path)[0]) == 3


@pytest.mark.parametrize('inside', ['runs/x', 'a/run'])
def test_a_run_folder_does_not_become_a_class(inside, tmp_path, tiny_options, capsys):
    fill(tmp_path/'a', 4), fill(tmp_path/'b', 4, 10)
    assert 'would lie among the class folders' in said(capsys, 'train', tmp_path, '--out', tmp_path/inside, *tiny_options)
    fill(tmp_path/'d'/'train'/'a', 4), fill(tmp_path/'d'/'train'/'b', 4, 10)
    assert main(['train', str(tmp_path/'d'), '--out', str(tmp_path/'d'/'runs'/'x'), *tiny_options]) == 0


@pytest.mark.parametrize('name, text, why', [
    ('c.csv', 'cat\ndog\nowl\n', "'cat', was taken for its header"), ('c.csv', 'cat,0\ndog,1\n', "write the header name,number"),
    ('c.txt', '0 cat\n1 dog\n', 'hold numbers beside names'), ('c.txt', 'cat,1\ndog,2\n', 'hold numbers beside names'), ('c.txt', '\n \n', 'names no class')])
def test_class_lists_that_would_be_misread(name, text, why, tmp_path):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=why): class_names(samples('0', '1'), [], tmp_path/name)


def test_a_count_is_no_number_of_a_class(tmp_path):
    (tmp_path/'c.csv').write_text('name,count\ncat,812\ndog,344\n')
    assert read_classes(tmp_path/'c.csv') == ['cat', 'dog']
    (tmp_path/'c.csv').write_text('name,id\ncat,812\ndog,344\n')
    assert read_classes(tmp_path/'c.csv') == ['dog', 'cat']
    with pytest.raises(ValueError, match="names 'cat' twice"): class_names(samples('cat', 'dog'), [], ['cat', 'dog', 'cat'])


def test_a_class_folder_that_is_a_dead_link(tmp_path):
    fill(tmp_path/'a', 3), fill(tmp_path/'b', 3, 10), (tmp_path/'zebra').symlink_to(tmp_path/'gone')
    with pytest.raises(ValueError, match='zebra.*is a link that leads nowhere'): source_samples(tmp_path)


def test_what_may_be_meant_by_a_path_that_leads_nowhere(tmp_path):
    fill(tmp_path/'i', 2)
    for path, hint in (('i\\0.png', r'write / for'), ('i/0', "'0.png' is: add the ending"), ('i/9', '9.; `mstoolkit')):
        df = pd.DataFrame(dict(path=[path, 'i/1.png'], label=['x', 'y']))
        with pytest.raises(FileNotFoundError, match=hint): source_samples(DataSource(tmp_path, csv=df))


def test_a_cache_that_is_cut_off(image_folder):
    dls = image_dls(image_folder, size=32, bs=8, num_workers=0, cache=True)
    file = next((image_folder/'.cache').glob('*.pixels'))
    os.truncate(file, file.stat().st_size//2)
    with pytest.raises(ValueError, match='cache.*is cut off: remove it'): list(dls.train)


def test_a_recipe_that_was_edited_is_no_longer_the_run(image_folder, tmp_path, tiny_options, capsys):
    from mstoolkit.runs import run_file
    assert main(['train', str(image_folder), '--out', str(tmp_path/'r'), *tiny_options]) == 0
    env = read_env(tmp_path/'r')
    env.pop('epochs')  # as if it had been stopped
    run_file(tmp_path/'r', 'env').write_text(json.dumps(env))
    recipe = run_file(tmp_path/'r', 'recipe')
    recipe.write_text(recipe.read_text().replace('bs = 8', 'bs = 4'))
    assert "bs 8 then, 4 now; put that back" in said(capsys, 'train', '--resume', tmp_path/'r')
    shutil.move(image_folder, tmp_path/'moved')
    assert 'say where they are now (mstoolkit train DATA --resume' in said(capsys, 'train', '--resume', tmp_path/'r')
